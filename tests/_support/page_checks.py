"""What a page owes to readers with a keyboard, a screen reader or a narrow screen, as the browser itself tells it."""

from __future__ import annotations

from typing import Any

_NAMED = {
    "button", "checkbox", "combobox", "DisclosureTriangle", "image", "link", "navigation", "progressIndicator",
    "region", "spinbutton", "textbox",
}  # fmt: skip
_FOCUSABLE = (
    "a[href], button, summary, input:not([type=hidden]), select, textarea, [tabindex]:not([tabindex='-1']):not(svg *)"
)
_STRUCTURE = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const faults = [];
  const one = (selector) => all(selector).length === 1 || faults.push(`${all(selector).length} of ${selector}`);
  one("main"); one("main h1"); one("header nav[aria-label]"); one("#connection[role=status]"); one("html[lang]");
  if (all("a[aria-current]").filter((a) => a.closest("header")).length > 1) faults.push("two sections are current");
  const ids = all("[id]").map((element) => element.id);
  if (new Set(ids).size < ids.length) faults.push(`an id twice: ${ids}`);
  const levels = all("h1, h2, h3, h4").map((heading) => Number(heading.tagName[1]));
  levels.forEach((level, at) => { if (level > (levels[at - 1] ?? 0) + 1) faults.push(`headings jump: ${levels}`); });
  all("table").forEach((table) => table.querySelector("thead th") || faults.push("a table without headings"));
  all("main script:not([src^='/']), main img, main iframe").forEach((e) => faults.push(e.outerHTML.slice(0, 80)));
  if (document.documentElement.scrollWidth > window.innerWidth) {
    faults.push(`${document.documentElement.scrollWidth} pixels wide`);
  }
  return faults;
}"""
_REACHED = f"""() => {{
  const now = document.activeElement;
  if (now === document.body) return null;
  const found = [...document.querySelectorAll("{_FOCUSABLE}")].filter((element) => element.checkVisibility());
  const style = getComputedStyle(now);
  const box = now.getBoundingClientRect();
  const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && box.right > 0 && box.width > 0;
  return {{ at: found.indexOf(now), of: found.length, seen, html: now.outerHTML.slice(0, 80) }};
}}"""
_MOST_STOPS = 300


def faults_of(tab: Any) -> list[str]:
    """Return what is wrong with a page: its landmarks, headings and tables, its width, and names that are missing.

    The names are those of the browser's accessibility tree, which it also gives to a screen reader.
    """
    session = tab.context.new_cdp_session(tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    nameless = [
        f"a {node['role']['value']} without a name"
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in _NAMED and not node.get("name", {}).get("value", "").strip()
    ]
    return [*tab.evaluate(_STRUCTURE), *nameless]


def keyboard_faults_of(tab: Any) -> list[str]:
    """Return what is wrong with a walk over a page by the key Tab: all stops in the page's order, each one seen."""
    stops = list[Any]()
    tab.evaluate("document.activeElement.blur()")
    for _ in range(_MOST_STOPS):
        tab.keyboard.press("Tab")
        stop = tab.evaluate(_REACHED)
        if stop is None or (stops and stop["at"] == 0):  # it is round
            break
        if stop["at"] >= 0:  # browsers also stop at boxes that scroll
            stops.append(stop)
    order = [stop["at"] for stop in stops]
    faults = [f"not seen when focused: {stop['html']}" for stop in stops if not stop["seen"]]
    if order != list(range(stops[0]["of"] if stops else 0)):
        faults.append(f"the order is {order}")
    return faults
