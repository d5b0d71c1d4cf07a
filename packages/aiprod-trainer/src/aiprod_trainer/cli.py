"""`aiprod train` and `aiprod distill`, joined to the command by entry points `aiprod.commands`.

For several processes: torchrun --nproc-per-node N -m aiprod_trainer.cli CONFIG.yaml
"""

from pathlib import Path
from typing import Annotated

import typer

from aiprod_pipelines.terminal import explains_errors

app = typer.Typer()
distill_app = typer.Typer()


@app.command()
@explains_errors
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="See configs/.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. lora.rank=32."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on from the latest checkpoint in output_dir, if any."
        ),
    ] = True,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Say what memory it takes and stop; exit code 2 where it cannot fit."
        ),
    ] = False,
) -> None:
    """Train a LoRA, an IC-LoRA or the whole model on prepared clips.

    [dim]aiprod train configs/nano/lora.yaml --set optimization.steps=500[/dim]
    [dim]aiprod train configs/ltx-2/lora_24gb.yaml --plan[/dim]
    """
    from aiprod_trainer.training_config import read_training_config

    settings = read_training_config(config, override)
    if plan:
        from aiprod_trainer.memory_plan import plan_training

        typer.echo(plan_training(settings))
        return
    from aiprod_trainer.train import train as run_training

    run_training(settings, resume=resume and not settings.checkpoints.no_resume)


@distill_app.command()
@explains_errors
def distill(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="See configs/nano/distill.yaml.")
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. mode=lora."),
    ] = None,
) -> None:
    """Distil a guided model into a student of 8 or 4 steps without guidance.

    Publishes NAME-distilled.safetensors and NAME-distilled-lora-RANK.safetensors in output_dir.
    Ctrl-C saves; run again, it goes on where it was.

    [dim]aiprod distill configs/nano/distill.yaml[/dim]
    [dim]aiprod distill configs/distill_ltx-2.yaml --set matching_steps=200[/dim]
    """
    from aiprod_trainer.config import read_config
    from aiprod_trainer.distill import DistillConfig
    from aiprod_trainer.distill import distill as run_distillation

    settings = read_config(config, DistillConfig, override)
    published = run_distillation(settings)
    for path in published:
        typer.echo(path)
    if not published:
        typer.echo(f"stopped; run again to go on from {settings.output_dir}")


if __name__ == "__main__":
    app()
