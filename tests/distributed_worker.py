"""What every process of test_distributed.py does; started by torchrun, or alone.

python distributed_worker.py TASK FOLDER
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from networks import Depthwise
from torch import nn
from torch.nn import functional as F

from limpq_ext import JointTrainer, evaluate, finetune, prepare
from limpq_ext.data.loading import make_loader
from limpq_ext.training.distributed import GradientExchange, process_group, rank, world_size
from limpq_ext.training.nonfinite import NonFiniteError

BITS = (2, 4, 6)
BATCH = 8


def trainer_of(*, frozen):
    torch.manual_seed(rank())  # process 0's start is everybody's
    prepared = prepare(Depthwise().double(), BITS, example_input=torch.zeros(1, 3, 8, 8).double())
    optimizer = torch.optim.SGD(prepared.double().parameters(), lr=0.02, momentum=0.9)
    if frozen:
        # In training mode but for batch normalisation, whose statistics are those of a process.
        prepared.train()
        for module in prepared.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train = lambda mode=True, module=module: module
                module.training = False
    return JointTrainer(prepared, optimizer, F.cross_entropy, sensitivity_every=2)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (BATCH,), generator=generator)


def share(tensor):
    return tensor.chunk(world_size())[rank()]


def joint(folder, *, frozen, steps):
    trainer = trainer_of(frozen=frozen)
    for step in range(steps):
        x, target = batch(step)
        result = trainer.step(share(x), share(target))
    state = {
        "parameters": dict(trainer.model.named_parameters()),
        "signed": {n: b for n, b in trainer.model.named_buffers() if "signed" in n},
        "losses": result.losses,
        "draw": result.draw,
        "sensitivities": dataclasses.asdict(trainer.sensitivities()),
    }
    torch.save(state, folder / f"{world_size()}-{rank()}.pt")


def exchange(folder):
    """Parameters that have a gradient everywhere, somewhere, nowhere."""
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in "abcd"})
    module["a"].grad = torch.full((3,), 1.0 + rank())
    if rank() == 1:
        module["b"].grad = torch.full((3,), 4.0)
    module["d"].grad = torch.full((3,), 3.0)
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (calls.append(a[0].dtype), original(*a, **k))[1]
    mean = GradientExchange(module.parameters()).run(torch.tensor([float(rank())]))
    grads = {name: p.grad for name, p in module.items()}
    torch.save({"grads": grads, "mean": mean, "calls": len(calls)}, folder / f"{rank()}.pt")


def failure(folder):
    """The data of process 1 alone are bad at the second step."""
    trainer = trainer_of(frozen=False)
    for step in range(3):
        x, target = batch(step)
        if step == 1 and rank() == 1:
            x = x * torch.nan
        try:
            trainer.step(share(x), share(target))
        except NonFiniteError as error:
            (folder / f"{rank()}.txt").write_text(str(error))
            return


def evaluation(folder):
    data = torch.utils.data.TensorDataset(torch.randn(21, 4), torch.arange(21) % 3)
    torch.manual_seed(0)
    data.tensors = (torch.randn(21, 4), torch.arange(21) % 3)
    model = nn.Linear(4, 3)
    result = evaluate(model, make_loader(data, batch_size=5, train=False))
    sizes = []
    loader = make_loader(data, batch_size=6, train=True, seed=1)
    records = finetune(model, loader, epochs=2, on_step=lambda done, total: sizes.append(total))
    torch.save(
        [result.accuracy, result.loss, result.samples, sizes, records[-1]["loss"], model.weight],
        folder / f"{world_size()}-{rank()}.pt",
    )


def main():
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_default_device("cpu")
    with process_group("cpu"):
        if task == "frozen":
            joint(folder, frozen=True, steps=5)
        elif task == "joint":
            joint(folder, frozen=False, steps=50)
        else:
            {"exchange": exchange, "failure": failure, "evaluation": evaluation}[task](folder)


if __name__ == "__main__":
    main()
