"""``torchrun --nproc-per-node=2 powersgd.py``: gradients of rank 2 in a loop of your own, rank 1 from the middle on."""

import torch
import torch.distributed as dist

import descentlab as dl

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)))
hook = dl.PowerSGDHook(rank=2).attach(model)
optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
x = torch.randn(512, 64)
y = (x @ torch.randn(64, 10)).argmax(1)
x, y = x[dist.get_rank() :: 2], y[dist.get_rank() :: 2]  # every process its own samples
for step in range(200):
    if step == 100:
        hook.set_rank(1)  # what is owed stays
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
if dist.get_rank() == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats; {hook.bytes_sent} bytes sent by each process")
dist.barrier()
dist.destroy_process_group()
