"""``compressor=powersgd compressor.policy=my_policy:Halving``: a rank that halves every few epochs."""


class Halving:
    """``first``, halved after every ``epochs`` epochs, never below 1."""

    def __init__(self, first=8, epochs=1):
        self.first, self.epochs = first, epochs

    def rank(self, moment):
        return max(1, self.first >> (moment.epoch // self.epochs))
