"""What a model computed, kept in a file and compared where no framework is."""
