"""Operations on this rank: what is done between requests, by all ranks of a replica or by none."""
