"""What counts as corrupt; read by the observable that counts it and by the report that shows it."""

CORRUPT = "corrupt_"  # first letters of the observable's columns
CORRUPT_BEYOND = 1e6  # larger absolute values are corrupt, as are NaN and infinity
CORRUPT_SHARE = 1e-3  # of the weights; more than this is too much, as published
