"""``descentlab run crossed timeline=asynchronous staleness_rule=my_staleness_rule:DropLate``: too late is not used."""

from descentlab.core.tree import tree_map


class DropLate:
    """A gradient more than ``most`` updates old becomes zero."""

    def __init__(self, most=3):
        self.most = most

    def adjust(self, grads, late):
        kept = late.versions <= self.most
        return tree_map(lambda g: g.where(kept.view(-1, *[1] * (g.dim() - 1)), 0.0), grads)
