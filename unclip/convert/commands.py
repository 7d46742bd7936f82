"""`unclip convert …`: one subcommand for each project whose weights are read."""

from pathlib import Path
from typing import Annotated

import typer

convert = typer.Typer(help="Turn other projects' weights into a model folder.", no_args_is_help=True)


@convert.callback()
def options() -> None:
    """Turn other projects' weights into a model folder."""


@convert.command()
def karlo(
    source: Annotated[str, typer.Argument(help="Folder or hub name: Karlo's layout, or a folder converted before.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    to_diffusers: Annotated[
        bool, typer.Option("--to-diffusers", help="Write Karlo's layout, which diffusers' classes load.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the stored weights: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Karlo (kakaobrain/karlo-v1-alpha, …-image-variations). The licence of the weights is copied."""
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"--dtype is {dtype}; give fp32, bf16 or fp16.")
    from unclip.convert.karlo import write_diffusers
    from unclip.core.files import check_replaceable
    from unclip.folder import INDEX
    from unclip.options import quiet_libraries
    from unclip.pipeline import UnCLIP

    check_replaceable(out, INDEX)
    quiet_libraries()
    pipe = UnCLIP.from_pretrained(source, dtype)
    typer.echo(write_diffusers(pipe, out) if to_diffusers else pipe.save_pretrained(out))
