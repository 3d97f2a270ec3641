"""The packed buffer of a 2:4 matrix: its layout, how the layout is discovered, and what packs on a device."""
