"""Everything between a job's acceptance and its first step: images, buckets, captions, embeddings, the manifest."""
