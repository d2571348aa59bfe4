"""``descentlab run crossed timeline=asynchronous timeline.delay=my_delay:Hiccups``: now and then a worker stalls."""

import numpy as np


class Hiccups:
    """Every gradient takes ``mean_s``, with probability ``share`` twenty times as long."""

    def __init__(self, mean_s=0.03, share=0.05):
        self.mean_s, self.share = mean_s, share

    def seconds(self, workers, steps, streams, replicate):
        step, worker = np.meshgrid(np.arange(steps), np.arange(workers), indexing="ij")
        u = streams.uniform("hiccups", 1, replicate=replicate, worker=worker, step=step)[..., 0]
        return np.where(u < self.share, 20.0, 1.0) * self.mean_s
