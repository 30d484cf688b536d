"""Drop-ins for other projects. Each module needs its project installed."""
