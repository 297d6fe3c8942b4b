"""The library beside hand-written psycopg and beside its peers: `python -m benchmarks`."""
