"""From files of conversations to shards: encoding, cutting, counting, in any number of processes."""
