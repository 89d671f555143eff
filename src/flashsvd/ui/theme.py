"""How the page looks: fonts of the system, so that none is fetched, and colours with enough contrast."""

from __future__ import annotations

from typing import Any

import gradio as gr

_SANS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

CSS = """
.gradio-container { max-width: min(1360px, 100vw) !important; margin: 0 auto; }
.gradio-container main, .gradio-container main .column, .gradio-container main .tabs { min-width: 0; }
.gradio-container .main, .gradio-container main { max-width: 100%; }
.page-head h1 { font-size: 1.6rem; margin: 0; letter-spacing: -0.01em; }
.page-head p { margin: 0.25rem 0 0; color: var(--body-text-color-subdued); }
.intro p { color: var(--body-text-color-subdued); }
.options .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr));
  background: none; }
.options .form > .block { min-width: 0 !important; }
.options .form > .block > .container { height: 100%; display: flex; flex-direction: column; }
.options .form > .block > .container > :last-child { margin-top: auto; }
.gradio-container .tab-container button.selected { color: #a8470a; }
.dark .gradio-container .tab-container button.selected, .gradio-container.dark .tab-container button.selected {
  color: #fb923c; }
.info-text { overflow-wrap: anywhere; }
.job-state { padding: 0.1rem 0; }
.job-state p { margin: 0 0 0.4rem; overflow-wrap: anywhere; }
.job-state .failed { border-left: 4px solid #b3261e; background: #fdecea; color: #7a1712; padding: 0.6rem 0.8rem;
  border-radius: 4px; }
.job-state .done { border-left: 4px solid #1b7f4b; background: #e8f5ee; color: #12532f; padding: 0.6rem 0.8rem;
  border-radius: 4px; }
.dark .job-state .failed { background: #3b1412; color: #f9d2ce; }
.dark .job-state .done { background: #10301f; color: #c6ecd6; }
.job-state progress { width: 100%; height: 0.6rem; accent-color: #c2560c; }
.result pre { overflow-x: auto; font-family: var(--font-mono); font-size: 0.8rem; line-height: 1.45; padding: 0.8rem;
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); border-radius: var(--radius-md);
  color: var(--body-text-color); }
.result .table { overflow-x: auto; }
/* Over what Gradio has for all tables. */
.result table { border: 0 !important; border-collapse: collapse; font-size: 0.85rem; width: 100%;
  font-variant-numeric: tabular-nums; }
.result th, .result td { text-align: right; padding: 0.35rem 0.6rem; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--border-color-primary); color: var(--body-text-color); }
.result th:first-child, .result td:first-child { text-align: left; }
.result .table p { font-size: 0.8rem; color: var(--body-text-color-subdued); margin: 0.35rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.pictures figure { margin: 0; background: #fff; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-md); padding: 0.6rem; }
.pictures figcaption { color: #1f2937; font-weight: 600; font-size: 0.9rem; margin-bottom: 0.4rem; }
.pictures img { width: 100%; height: auto; display: block; }
.log textarea { font-family: var(--font-mono); font-size: 0.78rem; white-space: pre; overflow-x: auto !important; }
@media (max-width: 520px) {
  .gradio-container .tab-container button { padding: 0 0.45rem; font-size: 0.85rem; }
  .result pre { font-size: 0.7rem; }
  .gradio-container main { padding-left: 0.5rem; padding-right: 0.5rem; }
}
"""


def theme() -> Any:
    return gr.themes.Default(
        primary_hue=gr.themes.colors.orange,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        # A button that can be pressed again looks so at once.
        button_transition="none",
        button_primary_background_fill="#b34a08",
        button_primary_background_fill_hover="#963d05",
        button_primary_background_fill_dark="#b34a08",
        button_primary_background_fill_hover_dark="#963d05",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )
