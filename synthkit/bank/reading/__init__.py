"""Reading rows: memory maps, plain reads, orders, streams, the whole bank on a device."""
