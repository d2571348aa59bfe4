"""``python load.py DIR``: the largest optimizer slot after each fault of a finished run, from its table."""

import sys

import descentlab as dl

results = dl.load(sys.argv[1] if len(sys.argv) > 1 else sys.exit("usage: python load.py DIR, as run recovery makes it"))
frame = results.frame.filter(role="fault")
for hit in results.hits:
    after = frame.filter(run=hit["run"], step=hit["step"])
    print(
        f"case {hit['case']} {hit['optimizer']:8} value {hit['new'][0]:9.2e} slot_max {after['slot_max'].item():9.2e}"
    )
