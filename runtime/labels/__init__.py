"""Answer the same questions about every n-th frame of recordings, into one Parquet file."""
