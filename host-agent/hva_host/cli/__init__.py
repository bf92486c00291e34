"""The command line: one module a subcommand. Only here does anything print, and only ``main`` exits."""
