"""Time and memory of the models on ragged bags, beside a padded and masked model of equal weights.

    python benchmarks/models.py [step] [bag] [--tiles N] [--threads N] [--repeats N]
                                [--cross-heads N]
    python benchmarks/models.py gpu [--batch N ...] [--bag-tiles N ...]

step: one training step (forward, backward, optimizer) of a batch of 4 bags of 200 to 8,000 tiles
(log-uniform) x 1024: perceiver in the published form with 4 blocks x 6 self-attention layers and
128 latents x 512, embedding 512, 2 + 2 text layers, vocabulary 8192, reports of 40 to 250 tokens.

bag: one bag of 100,000 x 1024 through 8 blocks with 512 latents x 512, forward and backward.

The padded model is written as a plain trainer does it: bags padded to the longest and masked, keys
and values projected in every block, logits at every place, layers that keep what autograd keeps.
It shares its weights with ours; outputs, loss and gradients are asserted to be equal. Times are
the least of some repeats, the two taking turns in one process. Memory is how far a process of its
own grows in the measured pass beyond what it held before it: weights, optimizer state, data and
the libraries' code are not counted, gradients are.

gpu: training steps in bfloat16 of the published width (512 latents x 1280, 12 + 12 text layers x
1024, vocabulary 42384) at several batches and bag lengths: seconds, tiles and tokens per second,
peak memory, and model FLOP utilisation (products of matrices that the model needs, recomputation
not counted, by the peak that --peak-tflops gives; the default is an H100's or H200's).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch
from slidevlm.losses import caption_loss_sum, contrastive_loss
from slidevlm.models import CoCa, ModelConfig
from slidevlm.models.attention import GEGLU, FeedForward
from slidevlm.models.slide.perceiver import Perceiver, PerceiverConfig
from slidevlm.models.text import DecoderConfig, TextConfig, TextEncoder
from slidevlm.train.optim import make_optimizer, parameter_groups

TILE_WIDTH = 1024
VOCABULARY = 8192
WAYS = ("ours", "padded")
MEGABYTE = 1e6


def published(width: int, latents: int, blocks: int, cross_heads: int) -> PerceiverConfig:
    """PRISM's and MOSAIC's perceiver."""
    return PerceiverConfig(
        width=width,
        latents=latents,
        blocks=blocks,
        self_layers=6,
        heads=8,
        positions="none",
        moments=False,
        cross_heads=cross_heads,
        read="features",
        query_residual=False,
        cross_hidden=width,
        self_hidden=width,
        self_activation="gelu",
        final_norm=False,
    )


def step_config(cross_heads: int) -> ModelConfig:
    """The model of `step`."""
    return ModelConfig(
        family="coca",
        slide_type="perceiver",
        slide=replace(published(512, 128, 4, cross_heads), output_width=512),
        text=TextConfig(width=512, layers=2, context_length=256, dropout=0.0),
        decoder=DecoderConfig(layers=2, slide_tokens=0, dropout=0.0),
        embed_dim=512,
        tile_width=TILE_WIDTH,
        pooling="none",
    )


def step_batch(shortest: int = 200) -> Batch:
    """4 bags and reports; seed 0 of torch."""
    torch.manual_seed(0)
    lengths = tuple(int(n) for n in shortest * 40 ** torch.rand(4))
    features = torch.randn(sum(lengths), TILE_WIDTH)
    words = torch.randint(shortest // 5, shortest * 5 // 4, (4,))
    mask = torch.arange(int(words.max())) < words[:, None]
    tokens = torch.randint(3, VOCABULARY, mask.shape) * mask
    names = ("a", "b", "c", "d")
    return Batch(Bags(features, lengths), tokens, mask, torch.arange(4), names, names)


# ---- the padded model -----------------------------------------------------------------------


def pad(bags: Bags) -> tuple[Tensor, Tensor]:
    """Features [B, N, D] with zeros after each bag's own, and the mask [B, 1, 1, N]."""
    features = nn.utils.rnn.pad_sequence(bags.features.split(list(bags.lengths)), batch_first=True)
    mask = torch.arange(features.shape[1]) < torch.tensor(bags.lengths)[:, None]
    return features, mask[:, None, None]


def plain_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, width] -> [B, H, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def plain_read(read: Any, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-attention [B, L, width] of padded [B, N, C], its keys and values projected here."""
    key_values, attention = read.key_values, getattr(read, "attention", None) or read.cross
    projected = key_values.project(key_values.norm(context)).chunk(2, -1)
    key, value = (plain_heads(part, key_values.heads) for part in projected)
    query = plain_heads(attention.query(attention.norm(x)), key_values.heads)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out(attended.transpose(1, 2).flatten(2))


def plain_feed_forward(part: GEGLU | FeedForward, x: Tensor) -> Tensor:
    """Without recomputation."""
    inner = part.inner(x)
    if isinstance(part, FeedForward):
        return part.outer(F.gelu(inner))
    a, b = inner.chunk(2, -1)
    return part.outer(a * F.gelu(b))


def plain_layer(layer: Any, x: Tensor) -> Tensor:
    """A self-attention layer [B, L, width]."""
    attention = layer.attention
    projected = attention.project(attention.norm(x)).chunk(3, -1)
    query, key, value = (plain_heads(part, attention.heads) for part in projected)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=attention.causal)
    x = x + attention.out(attended.transpose(1, 2).flatten(2))
    return x + plain_feed_forward(layer.feed_forward, layer.norm(x))


def padded_tokens(encoder: Perceiver, features: Tensor, mask: Tensor) -> Tensor:
    """The perceiver with `encoder`'s weights on padded bags: [B, N, D] -> [B, latents, width]."""
    latents = encoder.latents.expand(len(features), -1, -1)
    for block in range(encoder.blocks):
        read = encoder.further if block else encoder.first
        assert read is not None
        latents = plain_read(read, latents, features, mask)
        latents = latents + plain_feed_forward(read.feed_forward, read.norm(latents))
        for layer in encoder.self_attention:
            latents = plain_layer(layer, latents)
    return latents if encoder.output is None else encoder.output(latents)


def padded_loss(model: CoCa, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and embeddings [B, E] of a plain padded CoCa."""
    assert isinstance(model.slide, Perceiver) and model.decoder is not None
    slide = padded_tokens(model.slide, *pad(batch.bags))
    image = F.normalize(slide[:, 0], dim=-1)
    places = torch.arange(batch.tokens.shape[1])
    tower, project = cast(TextEncoder, model.text), cast(nn.Linear, model.text_project)
    hidden = tower.tokens(batch.tokens) + tower.positions(places)
    for layer in tower.layers:
        hidden = plain_layer(layer, hidden)
    text = F.normalize(project(tower.pool(hidden, batch.token_mask)), dim=-1)
    x = hidden[:, :-1]
    for layer in model.decoder.layers:
        x = plain_layer(layer.causal, x + plain_read(layer, x, slide[:, 1:], None))
    logits = model.decoder.vocabulary(cast(nn.LayerNorm, model.decoder.norm)(x))
    labels = batch.tokens[:, 1:].masked_fill(~batch.token_mask[:, 1:], -100)
    caption = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return caption + contrastive_loss(image, text, model.log_scale.exp(), None), image


def our_loss(model: CoCa, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same as training computes it."""
    output = model(batch.bags, batch.tokens, batch.token_mask, only_real=True)
    assert output.logits is not None and output.image_embedding is not None
    assert output.text_embedding is not None
    total = caption_loss_sum(output.logits, batch.tokens, batch.token_mask)
    caption = total / batch.token_mask[:, 1:].sum()
    image, text = output.image_embedding, output.text_embedding
    return caption + contrastive_loss(image, text, output.logit_scale, None), image


# ---- what is measured -----------------------------------------------------------------------


def away_from_the_start(model: nn.Module) -> None:
    """Branches that start at 0 would make outputs equal that are not."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def step_passes(
    cross_heads: int, batch: Batch
) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """The model, and a pass of each way that ends with an optimizer step; returns embeddings."""
    model = CoCa(step_config(cross_heads), VOCABULARY)
    away_from_the_start(model)
    # A rate of 0: the weights, and so the work, are the same in every pass.
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.2), lr=0.0, betas=(0.9, 0.999), eps=1e-8
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state, which is not what is measured
    optimizer.zero_grad()

    def make(loss_of: Callable[[CoCa, Batch], tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        def one() -> Tensor:
            optimizer.zero_grad()
            loss, image = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            return torch.cat([loss.detach()[None], image.detach().flatten()])

        return one

    return model, {"ours": make(our_loss), "padded": make(padded_loss)}


def bag_passes(tiles: int, cross_heads: int) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """The encoder, and a pass of each way, forward and backward; returns the tokens."""
    torch.manual_seed(0)
    features = torch.randn(tiles, TILE_WIDTH)
    encoder = Perceiver(published(512, 512, 8, cross_heads), TILE_WIDTH)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.05)
    weights = torch.randn(1, 512, 512)
    mask = torch.ones(1, 1, 1, tiles, dtype=torch.bool)

    def make(tokens_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def one() -> Tensor:
            encoder.zero_grad()
            tokens = tokens_of()
            (tokens * weights).sum().backward()
            return tokens.detach()

        return one

    return encoder, {
        "ours": make(lambda: encoder(Bags(features, (tiles,)))),
        "padded": make(lambda: padded_tokens(encoder, features[None], mask)),
    }


def passes(what: str, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """What a name of the command line means."""
    if what == "step":
        return step_passes(options.cross_heads, step_batch())
    return bag_passes(options.tiles, options.cross_heads)


def grown_megabytes(what: str, way: str, options: argparse.Namespace) -> float:
    """How far this process grows in one pass, at its peak."""
    # The code of the libraries comes into memory when it is first used.
    if what == "step":
        step_passes(options.cross_heads, step_batch(10))[1][way]()
    else:
        bag_passes(20, options.cross_heads)[1][way]()
    _, run = passes(what, options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now on
    before = _status("VmRSS")
    run[way]()
    return (_status("VmHWM") - before) / MEGABYTE


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status; memory is measured on Linux only")


def compare(what: str, options: argparse.Namespace) -> None:
    """Print one line for each way, and the ratios."""
    model, run = passes(what, options)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, list[Tensor]] = {}
    for _ in range(options.repeats):
        for way in WAYS:
            start = time.perf_counter()
            output = run[way]()
            seconds[way].append(time.perf_counter() - start)
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found[way] = [output, *gradients]
    for ours, padded in zip(found["ours"], found["padded"], strict=True):
        scale = float(padded.abs().max())
        torch.testing.assert_close(ours, padded, atol=1e-4 * scale, rtol=1e-3)
    del model, run, found
    memory = {way: _in_a_process(what, way) for way in WAYS}
    for way in WAYS:
        print(f"{what:5} {way:7} {min(seconds[way]):8.2f} s {memory[way]:8.0f} MB")
    times = min(seconds["padded"]) / min(seconds["ours"])
    print(
        f"{what:5} padded / ours: time {times:.2f}, memory {memory['padded'] / memory['ours']:.2f}"
    )


def _in_a_process(what: str, way: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", what, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


# ---- on a GPU -------------------------------------------------------------------------------


def gpu_config() -> ModelConfig:
    """The published width, with 12 + 12 text layers of BioGPT's."""
    return ModelConfig(
        family="coca",
        slide_type="perceiver",
        slide=replace(published(1280, 512, 8, 5), output_width=1024),
        text=TextConfig(width=1024, layers=12, heads=16, context_length=256, dropout=0.0),
        decoder=DecoderConfig(layers=12, heads=16, slide_tokens=0, dropout=0.0),
        embed_dim=1024,
        tile_width=TILE_WIDTH,
        pooling="none",
    )


def needed_flops(model: CoCa, batch: Batch) -> float:
    """Multiplications and additions of one step's matrix products: 3 times the forward pass's.

    Keys and values of a bag count once for each of the two kinds of cross-attention, and their
    input needs no gradient; padding of reports is not counted.
    """
    encoder = model.slide
    assert isinstance(encoder, Perceiver) and model.decoder is not None
    assert encoder.first is not None and encoder.further is not None
    tiles, bags = sum(batch.bags.lengths), len(batch)
    latents, width = encoder.latents.shape
    words = int(batch.token_mask.sum())

    def matrices(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    project = [read.key_values.project.weight.numel() for read in (encoder.first, encoder.further)]
    each_block = matrices(encoder.first) - project[0] + matrices(encoder.self_attention)
    among_latents = len(encoder.self_attention) * 4 * latents**2 * width * bags
    total = 2 * 2.0 * tiles * sum(project)
    total += 3 * encoder.blocks * (2 * bags * latents * each_block + among_latents)
    total += 3 * encoder.blocks * 4 * latents * tiles * width
    tower = cast(TextEncoder, model.text)
    text = [tower.layers, model.decoder.layers, model.decoder.vocabulary]
    layers: list[Any] = list(model.decoder.layers)
    views = sum(matrices(layer.key_values) for layer in layers)
    total += 6 * words * (sum(map(matrices, text)) - views) + 6 * bags * latents * views
    return total


def on_gpu(options: argparse.Namespace) -> None:
    """One line for each batch and bag length."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/models.py gpu: no CUDA device here")
    device, vocabulary, length = torch.device("cuda"), 42384, 256
    torch.manual_seed(0)
    model = CoCa(gpu_config(), vocabulary).to(device)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.2), lr=1e-5, betas=(0.9, 0.999), eps=1e-8
    )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print("batch   tiles  s/step    tiles/s  tokens/s      MB    MFU")
    for tiles in options.bag_tiles:
        for size in options.batch:
            # Bags differ, as they do: half as many to one and a half times as many tiles.
            lengths = tuple(int(n) for n in tiles * (0.5 + torch.rand(size)))
            features = torch.randn(sum(lengths), TILE_WIDTH, device=device, dtype=torch.bfloat16)
            tokens = torch.randint(3, vocabulary, (size, length), device=device)
            names = ("",) * size
            mask = torch.ones_like(tokens, dtype=torch.bool)
            ids = torch.arange(size, device=device)
            batch = Batch(Bags(features, lengths), tokens, mask, ids, names, names)
            try:
                seconds = _gpu_seconds(model, optimizer, batch, options.repeats)
            except torch.cuda.OutOfMemoryError:
                print(f"{size:5} {tiles:7}  out of memory")
                continue
            share = needed_flops(model, batch) / seconds / (options.peak_tflops * 1e12)
            peak = torch.cuda.max_memory_allocated() / MEGABYTE
            print(
                f"{size:5} {tiles:7} {seconds:7.3f} {sum(lengths) / seconds:10.0f} "
                f"{size * length / seconds:9.0f} {peak:7.0f} {share:6.1%}"
            )


def _gpu_seconds(
    model: CoCa, optimizer: torch.optim.Optimizer, batch: Batch, repeats: int
) -> float:
    """Mean of some steps, after two that are not counted."""
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for step in range(2 + repeats):
        if step == 2:
            start.record()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = our_loss(model, batch)
        loss.backward()
        optimizer.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="step, bag or gpu; default: step bag")
    parser.add_argument("--tiles", type=int, default=100_000, help="of the one bag")
    parser.add_argument("--cross-heads", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--bag-tiles", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device, bfloat16")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := {*options.what} - {"step", "bag", "gpu"}:
        parser.error(f"not one of step, bag, gpu: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    if options.memory_of:
        what, way = options.memory_of
        print(json.dumps(grown_megabytes(what, way, options)))
        return
    if "gpu" in options.what:
        on_gpu(options)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads")
    for what in options.what or ["step", "bag"]:
        compare(what, options)


if __name__ == "__main__":
    main()
