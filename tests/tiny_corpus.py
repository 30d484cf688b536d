"""A tiny model, its tokenizer, transcoders and a text. As a program, it encodes the text in
processes that it kills: tiny_corpus.py OUT KILLS SEED, or OUT largest BYTES."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from oracle import make_layer
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, encode_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

H, CTX = 32, 16
TEXTS = [
    " ".join(random.Random(seed).choices("a tower of bread and a cat in the rain".split(), k=n))
    for seed, n in enumerate([300, 1, 0, 77, 500, 20])
]
OPTIONS = {"ctx": CTX, "batch_size": 3, "part_tokens": 10 * CTX, "progress": False}


def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def transcoders():
    """Two coders; a bias puts some features of every position above their gate."""
    layers = {0: (200, "relu"), 2: (90, "topk")}
    generator = torch.Generator().manual_seed(0)
    return {
        layer: TranscoderWeights(
            **make_layer(features, H, kind=kind, seed=layer + 1),
            W_dec=torch.randn(H, features, generator=generator),
            layer=layer,
            hook_in="mlp.hook_in",
            hook_out="mlp.hook_out",
        )
        for layer, (features, kind) in layers.items()
    }


def encoder(**options):
    return SparseTranscoderEncoder(transcoders(), 12, 0.5, **options)


def encode(out, texts=TEXTS, **options):
    return encode_corpus(model(), tokenizer(), texts, encoder(), out, **(OPTIONS | options))


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_and_start_again(out, kills, seed):
    """Each child encodes the text and is killed at a random moment; the last one is not. A child
    is forked before torch has threads, so that nothing is imported anew."""
    lots, longest = random.Random(seed), 1.0
    for left in range(kills, -1, -1):
        start, child = time.monotonic(), os.fork()
        if child == 0:
            torch.set_num_threads(1)
            encode(out)
            os._exit(0)
        end = start + lots.uniform(0, longest) if left else float("inf")
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() >= end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.001)
        else:
            longest = time.monotonic() - start  # A run to its end, also one that had to do little.
            if left:  # All is there: begin anew.
                for path in (*out.glob("parts/*"), *out.glob("*.json"), *out.glob("*.bin")):
                    path.unlink()


def killed_while_it_writes(out, largest):
    """Encodes the text; the system kills the process when a file would be larger than this."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    encode(out)


if __name__ == "__main__":
    if sys.argv[2] == "largest":
        killed_while_it_writes(Path(sys.argv[1]), int(sys.argv[3]))
    else:
        kill_and_start_again(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
