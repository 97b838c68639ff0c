"""`guestmem`: the command line."""

from __future__ import annotations

import typer

from guestmem.cli import check, demo, doctor, explain, levels, run, serve, simulate

app = typer.Typer(no_args_is_help=True, add_completion=False, help="guest_memfd in user space.")
app.command("check")(check.check)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("explain")(explain.explain)
app.command("levels")(levels.levels)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("simulate")(simulate.simulate)

if __name__ == "__main__":
    app(prog_name="guestmem")
