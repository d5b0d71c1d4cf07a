"""The commands of `aiprod reward`, joined to `aiprod` by the entry point `aiprod.commands`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from aiprod_pipelines.terminal import JsonFlag, ModelOption, explains_errors, print_table

app = typer.Typer(
    name="reward", help="Judge clips by a model that was trained on what is better than what."
)


@app.command()
@explains_errors
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="configs/nano/reward.yaml")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. steps=400."),
    ] = None,
) -> None:
    """Train a reward model on spoilt clips of the world, and on a model's own.

    Ctrl-C saves; run again, it goes on where it was.
    [dim]aiprod reward train configs/nano/reward.yaml[/dim]
    """
    from aiprod_trainer.config import read_config
    from aiprod_trainer.reward import RewardTrainingConfig
    from aiprod_trainer.reward import train as run_training

    typer.echo(run_training(read_config(config, RewardTrainingConfig, override)))


@app.command()
@explains_errors
def score(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Clips to judge.")],
    prompt: Annotated[
        str | None, typer.Option(help="What they should show; default: that of each's recipe.")
    ] = None,
    model: ModelOption = "nano",
    reward: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: NAME-reward.safetensors beside the model."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score clips: picture, motion, text, synchrony, and their sum. Higher is better.

    A difference of scores is the log odds of one clip being preferred to the other, so scores
    compare clips and say nothing alone.
    [dim]aiprod reward score a.mp4 b.mp4 --prompt "a red ball bounces"[/dim]
    """
    from aiprod_pipelines.components import ModelSet
    from aiprod_pipelines.reward import score_file

    models = ModelSet.open(model)
    scores = {str(path): score_file(models, path, prompt, reward=reward) for path in files}
    if as_json:
        typer.echo(json.dumps(scores))
        return
    axes = list(dict.fromkeys(axis for found in scores.values() for axis in found))
    rows = [
        (name, *(f"{found[axis]:+.2f}" if axis in found else "-" for axis in axes))
        for name, found in scores.items()
    ]
    print_table(("file", *axes), rows)


@app.command()
@explains_errors
def pairs(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The data set's folder.")],
    model: ModelOption = "nano",
    prompts: Annotated[int, typer.Option(help="Captions of the world.")] = 256,
    seeds: Annotated[int, typer.Option(help="Clips of each, of which two become a pair.")] = 4,
    by: Annotated[str, typer.Option(help="Who ranks: reward, or judge (the world's).")] = "reward",
    world: Annotated[str, typer.Option(help="v1, or v2 with cameras.")] = "v1",
    seed: Annotated[int, typer.Option(help="Of prompts and clips.")] = 1,
    reward: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: NAME-reward.safetensors beside the model."),
    ] = None,
) -> None:
    """Generate and rank clips for preference fine-tuning (Flow-DPO).

    [dim]aiprod reward pairs --out runs/preferences[/dim]
    [dim]aiprod train configs/nano/dpo.yaml[/dim]
    """
    from aiprod_core.errors import InputError
    from aiprod_pipelines.components import ModelSet
    from aiprod_trainer.ranked_pairs import prepare_ranked_pairs

    if by not in ("reward", "judge"):
        raise InputError(f"--by must be reward or judge; got {by}, try reward.")
    prepare_ranked_pairs(
        ModelSet.open(model),
        out,
        prompts=prompts,
        seeds=seeds,
        by=by,  # pyright: ignore[reportArgumentType]
        world=world,
        seed=seed,
        reward=reward,
    )


if __name__ == "__main__":
    app()
