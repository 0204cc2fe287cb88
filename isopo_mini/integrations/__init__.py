"""The engine in other people's training code. Each module is thin, and loaded by name, with what it needs installed."""
