"""The command line: starts the processes of the service, and calls a running service over HTTP."""
