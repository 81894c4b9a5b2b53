"""A small GPT that learns to write Python, byte by byte, from the standard library's own sources.

It runs alone (`python examples/char_lm.py`) and, unchanged, on a cluster (`zml run -w 2 -p 2 examples/char_lm.py`).
The lines that make it so end in "# zml". All workers need the same version of Python, because it is the data.
"""

import argparse
import random
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import zml  # zml

NOT_OURS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}


def read_sources(folder: Path, context: int, samples: int, held_out: int) -> tuple[bytes, bytes]:
    """Text for `samples` training windows and `held_out` validation windows; no file is in both."""
    files = sorted(f for f in folder.rglob("*.py") if not NOT_OURS & set(f.relative_to(folder).parts))
    random.Random(0).shuffle(files)  # the same order everywhere, and not alphabetical
    train, valid = bytearray(), bytearray()
    for number, file in enumerate(files):
        text, windows = (valid, held_out) if number % 10 == 0 else (train, samples)
        if len(text) <= windows * context:
            text += file.read_bytes()
    if len(valid) <= held_out * context or len(train) <= samples * context:
        sys.exit(f"char_lm: the .py files of {folder} are too few for --samples {samples}")
    return bytes(train[: samples * context + 1]), bytes(valid[: held_out * context + 1])


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `context` bytes side by side; the target is the same window one byte later."""

    def __init__(self, text: bytes, context: int) -> None:
        self.bytes, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8), context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = self.bytes[i * self.context : (i + 1) * self.context + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape  # batch, time, channels
        qkv = self.qkv(self.norm1(x_BTC)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(seen.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.mlp(self.norm2(x_BTC))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads=4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.token.weight  # one matrix reads and writes

    def forward(self, bytes_BT: Tensor) -> Tensor:
        places_T = torch.arange(bytes_BT.shape[1])
        return self.head(self.norm(self.blocks(self.token(bytes_BT) + self.place(places_T))))

    @torch.no_grad()
    def write(self, prompt: bytes, count: int, seed: int) -> str:
        dice, text = torch.Generator().manual_seed(seed), torch.tensor([list(prompt)])
        for _ in range(count):
            chances = F.softmax(self(text[:, -self.context :])[:, -1] / 0.8, dim=-1)
            text = torch.cat([text, torch.multinomial(chances, 1, generator=dice)], dim=1)
        return "".join(chr(b) if 32 <= b < 127 or b == 10 else "?" for b in text[0].tolist())


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, valid: Dataset[tuple[Tensor, Tensor]]) -> float:
    return torch.stack([loss_of(model, x, y) for x, y in DataLoader(valid, batch_size=32)]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(usage="python examples/char_lm.py [FLAGS]", description=__doc__)
    flag = parser.add_argument
    flag("--epochs", type=int, default=5)
    flag("--samples", type=int, default=3072, help="training windows in an epoch")
    flag("--batch-size", type=int, default=16, help="windows per worker and step")
    flag("--layers", type=int, default=4)
    flag("--width", type=int, default=128, help="channels, a multiple of 4")
    flag("--context", type=int, default=128, help="bytes that the model sees at once")
    flag("--optimizer", choices=["adamw", "sgd"], default="adamw")
    flag("--lr", type=float, help="3e-3 for adamw and 0.1 for sgd if not given")
    flag("--clip", type=float, default=1.0, help="largest gradient norm, 0 for no limit")
    flag("--seed", type=int, default=0)
    flag("--text", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a folder with .py files")
    flag("--save", metavar="PATH", help="write the model here, as safetensors")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_text, valid_text = read_sources(args.text, args.context, args.samples, held_out=128)
    model = GPT(args.layers, args.width, args.context)
    if args.optimizer == "adamw":
        opt = torch.optim.AdamW(model.parameters(), lr=args.lr or 3e-3, weight_decay=0.1)
    else:
        opt = torch.optim.SGD(model.parameters(), lr=args.lr or 0.1, momentum=0.9)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs)
    train = DataLoader(Windows(train_text, args.context), batch_size=args.batch_size, shuffle=True)
    valid = Windows(valid_text, args.context)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, text from {args.text}", flush=True)

    train = zml.join(model, opt, train)  # zml
    for epoch in zml.epochs(args.epochs):  # zml
        for x, y in train:
            loss = loss_of(model, x, y)
            opt.zero_grad()
            loss.backward()
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            opt.step()
            zml.log(loss=loss)  # optional
        sched.step()
        nats = validation_loss(model, valid)
        print(f"epoch {epoch + 1}/{args.epochs}: validation loss {nats:.4f} nats per byte", flush=True)
    print(f"--- a sample ---\n{model.write(b'def ', 300, args.seed)}")
    if args.save:
        zml.save(args.save)  # optional


if __name__ == "__main__":
    main()
