"""Files on disk: published whole or not at all, guarded JSON, the commit of a shard, claims on shard ranges."""
