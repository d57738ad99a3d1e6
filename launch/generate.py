r"""Continues prompts with a trained model, on every device of every host.

One TPU VM, from a run (its newest checkpoint) or one of its checkpoints:
    python3 generate.py runs/mine "def main("
    python3 generate.py runs/mine/checkpoints/00002000 "def main(" "import "
Or from a Hugging Face folder, wherever it is:
    python3 generate.py gs://BUCKET/SmolLM2-135M "def main("
All hosts of a slice, each with this file; the run directory is one that all of them see:
    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
        --command="python3 generate.py gs://BUCKET/mine 'def main('"
A laptop, on eight simulated devices, whatever the model was trained on:
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python launch/generate.py runs/mine "def main("
"""

import argparse
import dataclasses
import os

import jax

import jaxgen
from jaxgen import distributed

sampling = jaxgen.SamplingConfig(max_tokens=64, temperature=0.8, top_p=0.95)


def main(location: str, prompts: list[str]) -> None:
    """Prints each prompt and what the model makes of it."""
    distributed.initialize(os.environ)
    jaxgen.enable_compilation_cache()
    pretrained = jaxgen.open_model(location)
    # Rows of the batch over all devices; tensor=N instead splits the model of a single prompt.
    mesh = jaxgen.make_mesh(jaxgen.MeshConfig(fsdp=-1))
    model, tokenizer = jaxgen.load_model(location, pretrained.serve_config(), mesh)
    with jax.set_mesh(mesh):
        samplings = [dataclasses.replace(sampling, seed=i) for i in range(len(prompts))]
        stops = pretrained.generation.stop_ids
        completions = jaxgen.generate_text(model, tokenizer, prompts, samplings, stops)
    if jax.process_index() == 0:
        for prompt, completion in zip(prompts, completions, strict=True):
            print(prompt + completion)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="runs/mine")
    parser.add_argument("prompts", nargs="*", default=["def main("])
    args = parser.parse_args()
    try:
        main(args.model, args.prompts)
    except jaxgen.UserError as error:
        parser.exit(2, f"{error}\n")
