"""The work of Palimpsest: it knows no HTTP and no command line. `api`, `workers` and `cli` are doors to it."""
