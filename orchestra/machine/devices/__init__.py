"""What a guest sees on its buses. A device takes register accesses; adapters give it its output, interrupt and end."""
