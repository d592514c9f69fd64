"""The page: three tabs of gradio, which know nothing and ask `panels` for everything they show.

Whatever a panel shows travels with each event (which query, which suspect), so that the server keeps no state of a
reader: two pages cannot get in each other's way, and a server that is started again goes on with pages that are open.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from upweight.errors import UpweightError
from upweight.explorer import panels, suspects
from upweight.explorer.run import Run
from upweight.explorer.suspects import Selection
from upweight.explorer.uploads import read_query
from upweight.explorer.words import short

HERE = ""
"""The name under which the method that answers here is chosen, instead of a file of scores."""

ISSUE = "issue:"
"""Before a kind of issue as a choice: gradio would translate a bare "label"."""

PER_LAYER = 40
"""Layers that are offered one by one."""


def asset(name: str) -> str:
    """A file of the page."""
    return resources.files("upweight.explorer").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def build(run: Run, reviewer: str = "") -> Any:
    """The page as gradio Blocks.

    Args:
        run: What it shows.
        reviewer: Name that decisions carry until another one is typed.
    """
    import gradio as gr

    # Nothing is fetched from elsewhere: the fonts are the reader's own.
    with gr.Blocks(
        title=f"{short(run.experiment.name, 60)} · upweight explorer", analytics_enabled=False
    ) as page:
        gr.HTML(
            panels.render(
                "head.html",
                name=short(run.experiment.name, 80),
                what=short(repr(run.experiment).removeprefix(f"Experiment {run.experiment.name!r}: ")),
            )
        )
        with gr.Tabs():
            with gr.Tab("Explain"):
                _explain_tab(gr, page, run)
            with gr.Tab("Review"):
                _review_tab(gr, page, run, reviewer)
            with gr.Tab("Decisions") as tab:
                listed = gr.HTML(elem_id="decisions", apply_default_css=False)
                answer = _answered(lambda: panels.decisions(run))
                tab.select(answer, None, listed, **_quiet())
                page.load(answer, None, listed, **_quiet())
    return page


def theme() -> Any:
    """Calm, with fonts that are on every machine."""
    import gradio as gr

    fonts: dict[str, Any] = {
        "font": ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        "font_mono": ["ui-monospace", "Menlo", "monospace"],
    }
    return gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="md", **fonts).set(
        body_background_fill="#f7f6f2",
        body_background_fill_dark="#111215",
        block_background_fill="*body_background_fill",
        block_background_fill_dark="*body_background_fill",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1a1c20",
        input_border_color="#e4e1d8",
        input_border_color_dark="#2c2e34",
        input_border_width="1px",
        block_border_width="0px",
        block_shadow="none",
    )


def _quiet(**more: Any) -> dict[str, Any]:
    """What every event has: no spinner over a panel, and no place in a public API."""
    return {"show_progress": "hidden", "api_visibility": "private", **more}


def _answered(panel: Callable[..., Any]) -> Callable[..., Any]:
    """The panel, or what is wrong in its place."""

    def answer(*values: Any) -> Any:
        try:
            return panel(*values)
        except UpweightError as error:
            return panels.message(str(error))
        except Exception as error:  # of the user's data or model; one query's must not end the page
            return panels.message(f"{type(error).__name__}: {error}")

    return answer


# Explain -------------------------------------------------------------------------------------------------------------


def _explain_tab(gr: Any, page: Any, run: Run) -> None:
    layers = _layers(run)
    methods = [
        *((short(name, 60), name) for name in run.saved),
        (f"{run.live.name}, computed here", HERE),
    ]
    key = gr.Textbox("query:0", visible=False)
    at = gr.Number(0, visible=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            of = gr.Dropdown(panels.choices(run.classes("query")), value=-1, label="Queries of class")
            listed = gr.HTML(js_on_load=asset("queries.js"), elem_id="queries", apply_default_css=False)
            with gr.Accordion("A query of your own", open=False):
                file = gr.File(
                    label="A picture, or any file that the experiment reads", type="filepath", height=110
                )
                text = gr.Textbox(label="or a text, or numbers", lines=2, max_lines=6)
                target = gr.Dropdown(
                    panels.choices(run.classes("train"), "what the model says"), value=-1, label="Its class"
                )
                ask = gr.Button("Explain it", elem_id="ask")
        with gr.Column(scale=5, min_width=420):
            with gr.Row():
                method = gr.Dropdown(methods, value=methods[0][1], label="Method")
                layer = gr.Dropdown(
                    [("all layers", ""), *((name, name) for name in layers)], value="", label="Layer"
                )
                only = gr.Dropdown(panels.choices(run.classes("train")), value=-1, label="Training class")
                count = gr.Dropdown([4, 8, 16, 32], value=8, label="Of each")
            shown = gr.HTML(elem_id="explanation", apply_default_css=False)
    options = [key, method, layer, only, count]

    def explain(*values: Any) -> str:
        return panels.explanation(run, values[0], values[1], values[2], _all(values[3]), int(values[4]))

    def choose(key: str, at: float, of: int, event: Any) -> tuple[str, float, str]:
        asked = event._data or {}
        key, at = str(asked.get("query", key)), int(asked.get("page", at))
        return key, at, panels.query_list(run, _all(of), at, key)

    choose.__annotations__["event"] = gr.EventData  # by which gradio knows what to pass

    def ask_for(file: str | None, text: str, target: int) -> tuple[str, str]:
        try:
            goal = None if target == -1 else float(target)
            upload = read_query(run.experiment, Path(file) if file else None, text, goal, run.live.predict)
        except UpweightError as error:
            raise gr.Error(short(error), print_exception=False) from None
        return run.add(upload), HERE

    explained = _answered(explain)
    listed.select(choose, [key, at, of], [key, at, listed], **_quiet())
    of.change(
        lambda key, of: (0, panels.query_list(run, _all(of), 0, key)), [key, of], [at, listed], **_quiet()
    )
    ask.click(ask_for, [file, text, target], [key, method], **_quiet(show_progress="minimal"))
    gr.on(
        [key.change, method.change, layer.change, only.change, count.change],
        explained,
        options,
        shown,
        **_quiet(show_progress="minimal", trigger_mode="always_last"),
    )
    page.load(lambda: panels.query_list(run, None, 0, "query:0"), None, listed, **_quiet())
    page.load(explained, options, shown, **_quiet())


def _layers(run: Run) -> list[str]:
    """Layers that scores may be split by: the model's, where the method that answers here can."""
    if not run.live.by_layer:
        return []
    named = [
        name
        for name, module in run.experiment.model.named_modules()
        if next(module.parameters(False), None) is not None
    ]
    return [name for name in named if name][:PER_LAYER]


def _all(choice: Any) -> int | None:
    return None if choice is None or int(choice) == -1 else int(choice)


# Review --------------------------------------------------------------------------------------------------------------


def _review_tab(gr: Any, page: Any, run: Run, reviewer: str) -> None:
    kinds = run.issues.kinds if run.issues is not None else []
    with gr.Row(visible=bool(kinds)):
        kind = gr.Dropdown(
            [(panels.KINDS[one], ISSUE + one) for one in kinds],
            value=ISSUE + kinds[0] if kinds else None,
            label="Issue",
        )
        label = gr.Dropdown(panels.choices(run.classes("train")), value=-1, label="Labelled")
        show = gr.Dropdown(
            [(text, name) for name, text in suspects.SHOW.items()], value="undecided", label="Show"
        )
        who = gr.Textbox(reviewer, label="Reviewer", max_length=200)
    shown = gr.HTML(js_on_load=asset("review.js"), elem_id="review", apply_default_css=False)

    def start(kind: str, label: int, show: str) -> str:
        wanted = Selection((kind or "").removeprefix(ISSUE), _all(label), show)
        row = None if run.issues is None else suspects.step(run.issues, wanted, run.decisions.all())
        return panels.review(run, wanted, row)

    def act(kind: str, label: int, show: str, who: str, event: Any) -> str:
        return decide(
            run, Selection((kind or "").removeprefix(ISSUE), _all(label), show), who, event._data or {}
        )

    act.__annotations__["event"] = gr.EventData
    shown.submit(act, [kind, label, show, who], shown, **_quiet())
    gr.on(
        [kind.change, label.change, show.change, page.load],
        _answered(start),
        [kind, label, show],
        shown,
        **_quiet(),
    )


def decide(run: Run, wanted: Selection, reviewer: str, event: dict[str, Any]) -> str:
    """Do what a key or a click asked for, and show what comes next.

    Args:
        run: With an issue table.
        wanted: What is stepped through.
        reviewer: Who decides.
        event: ``action``; ``row`` and ``key`` of the suspect on screen; ``label`` or ``to`` where the action takes one.

    Returns:
        The review panel; with what is wrong above it, if something is.
    """
    table = run.issues
    if table is None:
        return panels.review(run, wanted, None)
    row = event.get("row")
    row = row if isinstance(row, int) and 0 <= row < len(table) else None
    notice, by = "", 1
    action = str(event.get("action"))
    try:
        if action in ("keep", "relabel", "drop", "undo"):
            notice = _write(run, action, row, event, reviewer)
            by = 0 if action == "undo" else 1
        elif action in ("previous", "last"):
            by = -1
        elif action in ("go", "first"):
            to = event.get("to")
            row, by = (to, 0) if isinstance(to, int) and 0 <= to < len(table) else (None, 1)
    except UpweightError as error:
        return panels.review(run, wanted, row, str(error))
    decided = run.decisions.all()
    if action in ("go", "undo"):
        return panels.review(run, wanted, row, notice)
    if action == "last":
        rows = suspects.in_order(table, wanted)
        return panels.review(run, wanted, int(rows[-1]) if len(rows) else None)
    found = suspects.step(table, wanted, decided, row, by)
    return panels.review(run, wanted, row if found is None and by < 0 else found, notice)


def _write(run: Run, action: str, row: int | None, event: dict[str, Any], reviewer: str) -> str:
    """Keep a decision about the example that was on screen, which its id must agree with.

    Returns:
        That somebody else decided otherwise since the page was drawn; else an empty text.
    """
    assert run.issues is not None
    label = event.get("label")
    issue = None if row is None else run.issues.row(row)
    if issue is None or run.mark(issue["id"]) != event.get("key") or issue["id"] not in run.position:
        raise UpweightError(
            f"row {row} of the issue table is not the example on the page -> the table is another one: load it again"
        )
    name = issue["id"]
    before = run.decisions.all().get(name)
    if action == "relabel":
        _relabel(run, issue, label, reviewer)
    elif action == "undo":
        run.decisions.clear(name, reviewer)
    else:
        run.decisions.set(name, action, reviewer=reviewer)
    after = run.decisions.all().get(name)
    if before is None or before.at == event.get("seen") or after is None:
        return ""
    if (before.action, before.label) == (after.action, after.label):
        return ""
    return (
        f"Example {short(name, 60)}: {before.reviewer or 'somebody'} decided otherwise meanwhile ({before.action}); "
        f"now your {action} counts. The history has both."
    )


def _relabel(run: Run, issue: dict[str, Any], label: Any, reviewer: str) -> None:
    name = issue["id"]
    chosen = issue["predicted_label"] if label is None else _class(run, label)
    if chosen is None or chosen == issue["given_label"]:
        raise UpweightError(
            f"example {short(name, 60)} has no other label suggested -> choose a class, or keep or drop it"
        )
    run.decisions.set(name, "relabel", chosen, reviewer)


def _class(run: Run, label: Any) -> int:
    numbers = [number for _, number in run.classes("train")]
    if not isinstance(label, int) or label not in numbers:
        raise UpweightError(f"there is no class {label!r} -> one of {numbers[:12]}")
    return label
