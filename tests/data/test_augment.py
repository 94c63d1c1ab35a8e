from __future__ import annotations

import numpy as np
import pytest
import torch

from slidevlm.config import AUG_KEYS, AUG_TRANSFORMS, Config, validate, with_values
from slidevlm.data.augment import TRANSFORMS, Augmentation
from slidevlm.data.cases import Bag
from slidevlm.data.dataset import BagDataset, make_loader
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.sampling import TrainBatches
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import ConfigError, DataError
from slidevlm.flags import parse_config

TOKENIZER = Tokenizer.train(["Report of specimen 1."], 300)


def bag(count: int = 7, width: int = 5, dtype: torch.dtype = torch.float16) -> Bag:
    """Row i is known by its features, position and slide alike."""
    number = torch.arange(count, dtype=torch.float32)
    features = number[:, None] * 10 + torch.arange(width)
    positions = torch.stack([number + 1, -100 - number], dim=1)
    return Bag(features.to(dtype), positions, (number > 3).long(), "um", positions + 1000)


def outcomes(name: str, count: int = 200, **settings: float) -> list[Bag]:
    """The transform, always applied, for many specimens."""
    augmentation = Augmentation((name,), probability=1.0, **settings)
    return [augmentation(bag(), 0, 0, f"s{i}") for i in range(count)]


def test_flips_mirror_positions_and_nothing_else():
    before, seen = bag(), []
    for after in outcomes("random_flip"):
        sign = after.positions / before.positions
        assert (sign == sign[0]).all() and sign[0].abs().tolist() == [1, 1]
        seen.append(tuple(sign[0].tolist()))
        assert torch.equal(after.features, before.features)
        assert torch.equal(after.slides, before.slides) and after.unit == "um"
    assert set(seen) == {(-1, 1), (1, -1), (-1, -1)}
    assert min(seen.count(s) for s in set(seen)) > 40, "equally likely"


def test_rotations_turn_positions_and_nothing_else():
    before, seen = bag(), []
    x, y = before.positions.double().unbind(1)
    for after in outcomes("random_rotate90"):
        turned = after.positions.double()
        # The angle of the first tile tells the turn; every other tile must have made it too.
        z = torch.complex(turned[:, 0], turned[:, 1]) / torch.complex(x, y)
        assert torch.allclose(z, z[0].expand_as(z))
        seen.append((round(z[0].real.item()), round(z[0].imag.item())))
        assert torch.equal(after.features, before.features)
        assert torch.equal(after.slides, before.slides)
    assert set(seen) == {(0, 1), (-1, 0), (0, -1)}, "90, 180 and 270 degrees"
    assert min(seen.count(s) for s in set(seen)) > 40


def test_dropout_drops_tiles_whole():
    before, first = bag(), []
    for after in outcomes("tile_dropout", drop_fraction=0.5):
        rows = (after.features[:, 0] / 10).long()
        assert len(rows) == 4 and (rows.diff() > 0).all(), "3 of 7 are dropped, in order"
        for field in ("features", "positions", "slides", "centres"):
            assert torch.equal(getattr(after, field), getattr(before, field)[rows]), field
        first.append(tuple(rows.tolist()))
    assert len(set(first)) > 20
    assert all(any(row in f for f in first) for row in range(7))


@pytest.mark.parametrize(("fraction", "count", "left"), [(1.0, 7, 1), (0.9, 1, 1), (0.0, 7, 7)])
def test_dropout_never_empties_a_bag(fraction, count, left):
    augmentation = Augmentation(("tile_dropout",), 1.0, drop_fraction=fraction)
    plain = Bag(bag(count).features, None, None, None)
    assert len(augmentation(plain, 0, 0, "s").features) == left


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_noise_is_relative_to_each_channel_and_keeps_the_type(dtype):
    scale = torch.tensor([1.0, 30.0, 0.0, 0.01])
    draw = torch.Generator().manual_seed(0)
    features = (torch.randn(4000, 4, generator=draw) * scale).to(dtype)
    places = torch.rand(4000, 2, generator=draw)
    before = Bag(features, places, None, "px")
    after = Augmentation(("feature_noise",), 1.0, noise_std=0.5)(before, 0, 0, "s")
    assert after.features.dtype == dtype and torch.equal(after.positions, places)
    noise = (after.features.double() - features.double()).std(0) / scale.clamp_min(1e-9)
    assert noise.tolist() == pytest.approx([0.5, 0.5, 0.0, 0.5], rel=0.06)


def test_noise_keeps_what_is_finite_and_a_single_tile():
    wild = torch.tensor([[65504.0], [-65504.0], [65504.0], [0.0]], dtype=torch.float16)
    after = Augmentation(("feature_noise",), 1.0, noise_std=2.0)(
        Bag(wild, None, None, None), 0, 0, "s"
    )
    assert torch.isfinite(after.features).all() and not torch.equal(after.features, wild)
    assert torch.equal(outcomes_of_one_tile().features, bag(1).features)


def outcomes_of_one_tile() -> Bag:
    return Augmentation(("feature_noise",), 1.0)(bag(1), 0, 0, "s")


def test_draws_depend_on_seed_epoch_and_specimen_alone():
    augmentation = Augmentation(("random_flip", "tile_dropout", "feature_noise"), 0.5, 0.3, 0.2)

    def outcome(seed, epoch, specimen, transforms=augmentation):
        after = transforms(bag(30), seed, epoch, specimen)
        return after.features.tolist(), after.positions.tolist()

    first = [outcome(0, e, f"s{i}") for e in range(4) for i in range(8)]
    again = [outcome(0, e, f"s{i}") for e in range(4) for i in reversed(range(8))]
    assert first == [again[e * 8 + 7 - i] for e in range(4) for i in range(8)]
    other = [outcome(1, e, f"s{i}") for e in range(4) for i in range(8)]
    assert len({repr(x) for x in first}) > 20 and first != other
    # A transform's draws do not depend on those beside it.
    alone = Augmentation(("tile_dropout",), 0.5, 0.3)
    noisy = Augmentation(("tile_dropout", "feature_noise"), 0.5, 0.3, 0.0)
    for i in range(8):
        assert outcome(0, 0, f"s{i}", alone) == outcome(0, 0, f"s{i}", noisy)


def test_probability_is_of_each_transform():
    augmentation = Augmentation(("random_flip", "tile_dropout"), 0.25, 0.5)
    flipped = dropped = both = 0
    for i in range(800):
        after = augmentation(bag(10), 0, 0, f"s{i}")
        is_dropped = len(after.features) == 5
        is_flipped = bool((after.positions[0] < 0).tolist() != [False, True])
        flipped, dropped = flipped + is_flipped, dropped + is_dropped
        both += is_dropped and is_flipped
    assert flipped / 800 == pytest.approx(0.25, abs=0.05)
    assert dropped / 800 == pytest.approx(0.25, abs=0.05)
    assert both / 800 == pytest.approx(0.0625, abs=0.03)
    never = Augmentation(tuple(AUG_TRANSFORMS), 0.0)(bag(), 0, 0, "s")
    assert torch.equal(never.positions, bag().positions) and len(never.features) == 7


# --- in the dataset -------------------------------------------------------------------------


def dataset(path, augmentation, training=True):
    store = Hdf5Cases(path, "uni", "report")
    reports = [store.text(case) for case in store.cases]
    return BagDataset(store, store.cases, reports, TOKENIZER, 64, 20, 0, training, augmentation)


def test_positions_turn_about_the_centre_of_their_slide(write):
    path = write([30])  # two slides; 20 of the 30 tiles are sampled
    plain = dataset(path, Augmentation())[0].bag
    flipped = dataset(path, Augmentation(("random_flip",), 1.0))[0].bag
    sign = torch.where((flipped.positions == -plain.positions).all(0), -1.0, 1.0)
    assert torch.equal(flipped.positions, plain.positions * sign) and (sign < 0).any()
    assert torch.equal(flipped.features, plain.features)
    # About the centre: a slide of which all tiles are there keeps its box.
    whole = dataset(write([15], "b.h5"), Augmentation(("random_flip",), 1.0))[0].bag
    for slide in (0, 1):
        box = whole.positions[whole.slides == slide]
        assert (box.amin(0) == -box.amax(0)).all()


def test_workers_and_the_order_of_reading_change_nothing(write):
    path = write([5 + 3 * i for i in range(12)])
    augmentation = Augmentation(tuple(AUG_TRANSFORMS), 0.7, 0.3, 0.2)
    found = []
    for workers, ranks in ((0, 1), (2, 1), (0, 2)):
        bags = {}
        for rank in range(ranks):
            data = dataset(path, augmentation)
            batches = TrainBatches(12, 12 // (2 * ranks), 0, rank, ranks)
            loader = make_loader(data, batches, workers)
            for epoch in (0, 1):
                batches.set_epoch(epoch)
                for batch in loader:
                    parts = batch.bags.features.split(batch.bags.lengths)
                    places = batch.bags.positions.split(batch.bags.lengths)
                    for name, part, place in zip(batch.specimen_ids, parts, places, strict=True):
                        bags[epoch, name] = (part.tolist(), place.tolist())
        assert len(bags) == 24
        found.append(bags)
    assert found[0] == found[1] == found[2]
    assert sum(found[0][0, f"s{i}"] != found[0][1, f"s{i}"] for i in range(12)) > 6


def test_a_bag_without_positions_is_named(tmp_path):
    from slidevlm.data.formats.hdf5_cases import CaseWriter

    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p0", "s0", np.ones((4, 3), "f2"), "a")
    with pytest.raises(DataError, match=r"a\.h5: specimen 's0' has no positions for random_flip"):
        dataset(tmp_path / "a.h5", Augmentation(("random_flip",)))[0]
    assert len(
        dataset(tmp_path / "a.h5", Augmentation(("tile_dropout",), 1.0, 0.5))[0].bag.features
    )


# --- the argument ---------------------------------------------------------------------------


def problems(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(with_values(Config(), {"aug_cfg": values}))
    return "\n".join(line for line in str(caught.value).splitlines() if "--aug-cfg" in line)


def test_declarations_are_those_of_the_transforms():
    assert sorted(AUG_TRANSFORMS) == sorted(TRANSFORMS)
    assert {*AUG_KEYS, "transforms"} == set(Augmentation.__dataclass_fields__)


@pytest.mark.parametrize(
    "value",
    ["random_flip,tile_dropout", ["random_flip", "tile_dropout"], "random_flip , tile_dropout"],
)
def test_several_transforms(value):
    config = with_values(Config(), {"aug_cfg": {"transform_type": value, "drop_fraction": 0.2}})
    assert config.data.aug_transforms == ("random_flip", "tile_dropout")
    assert "--aug-cfg" not in problems_of(config)


def problems_of(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:  # there is no data in it
        validate(config)
    return str(caught.value)


def test_the_command_line():
    words = ["--aug-cfg", "transform_type=['random_flip', 'feature_noise']", "noise_std=1e-2"]
    config, _ = parse_config([*words, "probability=1"])
    assert config.data.aug_transforms == ("random_flip", "feature_noise")
    assert config.data.aug_cfg["noise_std"] == 0.01 and "--aug-cfg" not in problems_of(config)
    with pytest.raises(ConfigError, match="'probability' is given twice"):
        parse_config(["--aug-cfg", "transform_type=random_flip", "probability=1", "probability=0"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probability": 0.5}, "needs transform_type, one or several of random_flip, random_rot"),
        ({"transform_type": 3}, "needs transform_type"),
        ({"transform_type": []}, "needs transform_type"),
        ({"transform_type": "mixup"}, "does not know mixup; it knows random_flip, random_rotate90"),
        ({"transform_type": "random_flip,"}, "transform_type does not know"),
        ({"transform_type": "random_flip,random_flip"}, "names one twice"),
        (
            {"transform_type": "random_flip", "p": 0.5, "angle": 3},
            "not know p, angle; it knows transform_type, probability, drop_fraction, noise_std",
        ),
        ({"transform_type": "random_flip", "noise_std": 1}, "noise_std belongs to feature_noise"),
        ({"transform_type": "random_flip", "probability": 1.5}, "a number from 0 to 1, not 1.5"),
        ({"transform_type": "random_flip", "probability": True}, "from 0 to 1, not True"),
        ({"transform_type": "random_flip", "probability": float("nan")}, "from 0 to 1, not nan"),
        ({"transform_type": "tile_dropout", "drop_fraction": "a/b=c"}, "to 1, not 'a/b=c'"),
        ({"transform_type": "feature_noise", "noise_std": -1}, "a number 0 or more, not -1"),
        ({"transform_type": "feature_noise", "noise_std": float("inf")}, "0 or more, not inf"),
    ],
)
def test_mistakes_are_found_before_data_is_opened(values, message):
    assert message in problems(**values)
