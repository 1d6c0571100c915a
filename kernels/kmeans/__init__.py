"""K-means of the queries, or the keys, of a head: the semantic clusters of Sparse VideoGen 2."""
