"""The exact step: recorded oracles, and any split of a batch against the whole batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch, Output
from slidevlm.errors import TrainingError
from slidevlm.losses import caption_loss_sum, contrastive_loss
from slidevlm.models import CoCa, create_model
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, sigmoid_term, softmax_term

CPU = torch.device("cpu")


class Recorded(nn.Module):
    """A model whose outputs are its parameters: gradients of outputs become visible."""

    def __init__(self, inputs: dict[str, Tensor], scale: str, bias: bool) -> None:
        super().__init__()
        self.image = nn.Parameter(inputs["img"].double())
        self.text = nn.Parameter(inputs["txt"].double())
        self.decoder = nn.Module()
        self.logits = nn.Parameter(inputs["logits"].double())
        self.log_scale = nn.Parameter(torch.as_tensor(inputs[scale]).double())
        self.bias = nn.Parameter(torch.as_tensor(inputs["bias"]).double()) if bias else None

    def forward(
        self, bags: Bags, tokens: Tensor, mask: Tensor, *, with_logits: bool, only_real: bool
    ) -> Output:
        rows = bags.features[:, 0].long()
        return Output(
            self.image[rows],
            self.text[rows],
            self.logits[rows][mask[:, 1:]] if with_logits else None,
            self.log_scale.exp(),
            self.bias,
        )

    def clamp_scale(self) -> None:
        pass


def recorded_batches(labels: Tensor, k: int) -> list[Batch]:
    """The oracle's rows as k micro-batches; its labels are shifted already and 0 is padding."""
    tokens = torch.cat([torch.ones(8, 1, dtype=torch.int64), labels], dim=1)
    mask = torch.cat([torch.ones(8, 1, dtype=torch.bool), labels != 0], dim=1)
    batches = []
    for rows in torch.arange(8).chunk(k):
        names = tuple(str(int(r)) for r in rows)
        bags = Bags(rows[:, None].double(), (1,) * len(rows))
        batches.append(Batch(bags, tokens[rows], mask[rows], rows, names, names))
    return batches


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_coca_oracle_at_any_accumulation(shared, k: int) -> None:
    recorded = torch.load(shared / "oracles/losses/losses_ws1.pt", weights_only=True)
    inputs, expected = recorded["inputs"], recorded["ranks"][0]["coca/local=0/gwg=0"]
    model = Recorded(inputs, "log_scale", bias=False)
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = Step(model, optimizer, objective, resolve("fp32", CPU), None)
    terms = step.gradients(recorded_batches(inputs["labels"], k))
    close = {"atol": 1e-10, "rtol": 0}
    # The oracle's terms and logits gradient carry their weights.
    torch.testing.assert_close(terms.contrastive, expected["contrastive_loss"].double(), **close)
    torch.testing.assert_close(
        2 * terms.caption.double(), expected["caption_loss"].double(), atol=1e-6, rtol=0
    )
    for name, key in [
        ("image", "g_img"),
        ("text", "g_txt"),
        ("logits", "g_logits"),
        ("log_scale", "g_log_scale"),
    ]:
        torch.testing.assert_close(getattr(model, name).grad, expected[key].double(), **close)


@pytest.mark.parametrize("k", [1, 4])
def test_siglip_oracle_in_the_step(shared, k: int) -> None:
    recorded = torch.load(shared / "oracles/losses/losses_ws1.pt", weights_only=True)
    inputs, expected = recorded["inputs"], recorded["ranks"][0]["siglip/bidir/chunk=0"]
    model = Recorded(inputs, "sig_log_scale", bias=True)
    objective = Objective(sigmoid_term, 1.0, 0.0, mask_duplicates=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = Step(model, optimizer, objective, resolve("fp32", CPU), None)
    step.gradients(recorded_batches(inputs["labels"], k))
    for name, key in [("image", "g_img"), ("text", "g_txt"), ("bias", "g_bias")]:
        torch.testing.assert_close(
            getattr(model, name).grad, torch.as_tensor(expected[key]).double(), atol=1e-10, rtol=0
        )


# --- any split of a batch has the gradient of the whole batch -------------------------------


def tiny(*, siglip: bool = False, dropout: bool = False) -> CoCa:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tile_width=6, vocab_size=20, siglip=siglip).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if dropout else 0.0
    with torch.no_grad():  # a new model's residual branches are 0 and would hide mistakes
        for name, parameter in model.named_parameters():
            if name not in ("log_scale", "bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(sizes: tuple[int, ...], seed: int = 1) -> list[Batch]:
    """The same specimens, however they are cut: ragged bags, ragged reports, two of them equal."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    rows = []
    for i in range(n):
        length = int(torch.randint(1, 9, (), generator=generator))
        words = int(torch.randint(1, 7, (), generator=generator))
        features = torch.randn(length, 6, generator=generator, dtype=torch.float64)
        positions = 1e4 * torch.rand(length, 2, generator=generator)
        report = torch.randint(3, 20, (words,), generator=generator).tolist()
        rows.append((features, positions, [1, *report, 2], i if i != 3 else 0))
    cut, start = [], 0
    for size in sizes:
        part = rows[start : start + size]
        longest = max(len(r[2]) for r in part)
        tokens = torch.zeros(size, longest, dtype=torch.int64)
        mask = torch.zeros(size, longest, dtype=torch.bool)
        for i, row in enumerate(part):
            tokens[i, : len(row[2])] = torch.tensor(row[2])
            mask[i, : len(row[2])] = True
        bags = Bags(
            torch.cat([r[0] for r in part]),
            tuple(len(r[0]) for r in part),
            torch.cat([r[1] for r in part]),
            None,
            "um",
        )
        names = tuple(f"s{start + i}" for i in range(size))
        cut.append(Batch(bags, tokens, mask, torch.tensor([r[3] for r in part]), names, names))
        start += size
    return cut


def step_for(model: CoCa, contrastive=1.0, caption=2.0, term=softmax_term, lr=1e-2, **options):
    objective = Objective(term, contrastive, caption, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=lr, betas=(0.9, 0.98), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve("fp32", CPU), options.get("clip_norm"))


def reference_gradients(model: CoCa, batch: Batch) -> dict[str, Tensor]:
    """The objective as it is written down, on the whole batch, by plain autograd."""
    output = model(batch.bags, batch.tokens, batch.token_mask)
    loss = contrastive_loss(
        output.image_embedding, output.text_embedding, output.logit_scale, batch.report_ids
    )
    count = batch.token_mask[:, 1:].sum()
    total = caption_loss_sum(output.logits, batch.tokens, batch.token_mask)
    loss = loss + 2 * total / count
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 2, 2, 2), (5, 3), (1,) * 8])
def test_any_split_has_the_gradient_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    model = tiny()
    expected = reference_gradients(copy.deepcopy(model), batches((8,))[0])
    step_for(model).gradients(batches(sizes))
    for name, parameter in model.named_parameters():
        # float32 enters where embeddings and logits are turned to it for the losses.
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_temperature_gradient_is_not_multiplied_by_accumulation() -> None:
    gradients = []
    for sizes in [(8,), (2, 2, 2, 2)]:
        model = tiny()
        step_for(model).gradients(batches(sizes))
        gradients.append(model.log_scale.grad.item())
    assert gradients[0] != 0
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-6)


def test_five_steps_accumulated_equal_five_whole_steps() -> None:
    results = []
    for sizes in [(8,), (4, 4)]:
        model = tiny()
        step = step_for(model)
        for i in range(5):
            step(batches(sizes, seed=i), 1e-3)
        results.append(model.state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=0, msg=name)


def test_accumulation_replays_dropout() -> None:
    """Both passes of a micro-batch drop the same units: the embeddings of the first pass, from
    which the gradient was taken, are those of the second."""
    model = tiny(dropout=True)
    step = step_for(model)
    seen: list[Tensor] = []
    forward = model.forward

    def spy(*args: object, **kwargs: object) -> Output:
        output = forward(*args, **kwargs)
        seen.append(output.text_embedding.detach().clone())
        return output

    model.forward = spy
    torch.manual_seed(5)
    step.gradients(batches((4, 4)))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
    step.gradients(batches((4, 4)))
    assert not torch.equal(seen[0], seen[4]), "the next step must drop others"


@pytest.mark.parametrize(("contrastive", "caption"), [(0.0, 2.0), (1.0, 0.0)])
def test_weight_zero_switches_a_term_off(contrastive: float, caption: float) -> None:
    model = tiny()
    terms = step_for(model, contrastive, caption).gradients(batches((4, 4)))
    decoder = [p.grad for p in model.decoder.layers.parameters()]
    if caption == 0:
        assert all(g is None for g in decoder)
        assert terms.loss == terms.contrastive and terms.caption is None
    else:
        assert all(g is not None for g in decoder)
        assert model.text_project.weight.grad is None
        assert model.log_scale.grad is None
        assert terms.loss == 2 * terms.caption and terms.contrastive is None


def test_siglip_takes_the_contrastive_place_in_coca() -> None:
    model = tiny(siglip=True)
    assert model.log_scale.item() == pytest.approx(math.log(10))
    assert model.bias.item() == -10
    terms = step_for(model, term=sigmoid_term).gradients(batches((4, 4)))
    assert model.bias.grad.item() != 0
    softmax = tiny()
    other = step_for(softmax).gradients(batches((4, 4)))
    assert terms.contrastive.item() != pytest.approx(other.contrastive.item())


def test_duplicates_are_no_negatives() -> None:
    losses = []
    for masked in (True, False):
        model = tiny()
        step = step_for(model)
        step.objective = Objective(softmax_term, 1.0, 0.0, mask_duplicates=masked)
        losses.append(step.gradients(batches((8,))).contrastive.item())
    assert losses[0] < losses[1]


def test_clipping_bounds_what_the_optimizer_sees() -> None:
    model = tiny()
    step = step_for(model, clip_norm=0.01)
    terms = step(batches((8,)), 0.0)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert terms.gradient_norm > 0.01
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_stop() -> None:
    model = tiny()
    step = step_for(model)
    step(batches((4,)), 1e-3)
    before = copy.deepcopy(model.state_dict())
    poisoned = batches((4,))
    poisoned[0].bags.features[0] = float("nan")
    assert step(poisoned, 1e-3).skipped
    assert step.skipped == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for _ in range(8):
        step(poisoned, 1e-3)
    with pytest.raises(TrainingError, match=r"10 steps in a row.*s0, s1, s2, s3"):
        step(poisoned, 1e-3)


def test_a_good_step_in_between_starts_the_count_anew() -> None:
    step = step_for(tiny())
    poisoned = batches((4,))
    poisoned[0].bags.features[0] = float("nan")
    for _ in range(3):
        for _ in range(9):
            step(poisoned, 1e-3)
        assert not step(batches((4,)), 1e-3).skipped
    assert step.skipped == 27


def test_scale_stays_between_1_and_100() -> None:
    model = tiny()
    for start in (50.0, -3.0):
        nn.init.constant_(model.log_scale, start)
        step_for(model)(batches((4,)), 0.0)
        assert 0.0 <= model.log_scale.item() <= math.log(100) + 1e-12
