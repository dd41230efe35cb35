"""A small model of four Markov sources meets a fifth, half new, with a few slots beside its networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.catalogue import Check, proof
from remanence.memory.locas import Locas
from remanence.memory.parts import RMSNorm
from remanence.models.language import ChannelMixer
from remanence.state import State

ALPHABET, WIDTH, UNITS, SLOTS, CHUNK = 64, 32, 96, 8, 64


class Model(nn.Module):
    """Tokens to logits of the next one, through two gated feed-forward networks; it carries no state."""

    vocabulary = ALPHABET

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ALPHABET + 1, WIDTH)
        self.norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(2))
        self.mixers = nn.ModuleList(ChannelMixer(WIDTH, UNITS) for _ in range(2))
        self.head = nn.Linear(WIDTH, ALPHABET)

    def initial_state(self, rows: int) -> State:
        return {}

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x), state


def source(g: torch.Generator) -> Tensor:
    return (2.5 * torch.randn(ALPHABET, ALPHABET, generator=g)).softmax(1)


def draw(table: Tensor, rows: int, time: int, g: torch.Generator) -> Tensor:
    tokens = [torch.randint(ALPHABET, (rows,), generator=g)]
    for _ in range(time - 1):
        tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=g)[:, 0])
    return torch.stack(tokens, 1)


def trained(tables: list[Tensor], g: torch.Generator) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    text = torch.cat([draw(table, 32, 65, g) for table in tables])
    for _ in range(100):
        batch = text[torch.randperm(len(text), generator=g)[:32]]
        loss = F.cross_entropy(model(batch[:, :-1], {})[0].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def raised(model: Model, tokens: Tensor, direction: torch.Generator | None) -> int:
    """How many tokens are likelier once written into a slot of their own; or once a slot says anything at random."""
    count = 0
    for i in range(1, tokens.shape[1]):
        side = Locas(model, variant="mlp")
        state = {"model": {}, "last": tokens[:, i - 1]}
        before, _ = side.read(tokens[:, i : i + 1], state)
        if direction is not None:
            for s in side.sides:
                said = torch.randn(s.value.shape, generator=direction)
                s.value = nn.Parameter(said * s.value.norm() / said.norm())
        after, _ = side.read(tokens[:, i : i + 1], state, learn=False)
        side.detach()
        count += int(after < before)
    return count


def scored(side: Locas, text: Tensor, learn: bool) -> float:
    """The mean loss of a text, read by chunks."""
    losses, state = [], side.initial_state(len(text))
    for chunk in text.split(CHUNK, 1):
        loss, state = side.read(chunk, state, learn=learn)
        losses.append(loss)
    return torch.cat(losses, 1).mean().item()


@proof(
    "locas",
    "Beside a frozen model that meets a half-new source, 8 slots per network gain at least 0.05 nats while they read, "
    "and a slot makes its token likelier 100 times of 100; detached, nothing has changed. Slots taught by other text "
    "gain less, and slots that say anything help half of the time.",
)
def locas() -> tuple[Check, Check]:
    g = torch.Generator().manual_seed(0)
    tables = [source(g) for _ in range(4)]
    model = trained(tables, g)
    stream = draw((tables[0] + source(g)) / 2, 1, 2048, g)
    foreign = draw(source(g), 1, 2048, g)
    known = draw(tables[1], 1, 1024, g)
    before = model(stream, {})[0]
    side = Locas(model, stream[:, :CHUNK], slots=SLOTS, lr=0.03)
    same = torch.equal(model(stream, {})[0], before)
    static, old = scored(side, stream, False), scored(side, known, False)
    gain = static - scored(side, stream, True)
    lost = scored(side, known, False) - old
    side.detach()
    other = Locas(model, stream[:, :CHUNK], slots=SLOTS, lr=0.03)
    scored(other, foreign, True)
    foreign_gain = static - scored(other, stream, False)
    other.detach()
    same = same and torch.equal(model(stream, {})[0], before)
    likelier, chance = (raised(model, stream[:, :101], d) for d in (None, torch.Generator().manual_seed(1)))
    says = "{:+.3f} of {:.2f} nats, {} of 100 written tokens likelier".format
    kept = f", a known source {lost:+.3f}; {'the same' if same else 'another'} model before and after"
    return (
        Check(gain >= 0.05 and likelier == 100 and same, says(-gain, static, likelier) + kept),
        Check(foreign_gain >= 0.05 or chance == 100, says(-foreign_gain, static, chance)),
    )
