"""What is measured of a loaded engine: memory, throughput and quality."""
