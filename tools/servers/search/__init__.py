"""A search server: Search-R1's `/retrieve` over a BM25 index."""
