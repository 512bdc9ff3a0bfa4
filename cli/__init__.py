"""The command line: the door for people. It starts the service, and speaks to a running one over HTTP."""
