"""Drop-ins for other projects; each module needs its project installed."""
