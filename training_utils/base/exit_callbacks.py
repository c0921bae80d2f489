"""What must be done before a process leaves: processes of several leave without atexit's functions."""

EXIT_CALLBACKS = []  # functions that `run` calls before it leaves: processes of several leave without atexit's
