// Keeps a page new: when the server says that it has changed, its live regions are fetched and replaced.

const connection = document.getElementById("connection");
const SELECTABLE = "input, select, textarea, button, summary, a[href]";

/** Whether the reader is typing in a region, which must then stay as it is. */
function inUse(region) {
  const active = document.activeElement;
  return region.contains(active) && active.matches("input:not([type=checkbox]), textarea, select");
}

/** Carry over what the reader has opened, ticked and focused from a region to the one that replaces it. */
function keepState(old, fresh) {
  const opened = old.querySelectorAll("details");
  fresh.querySelectorAll("details").forEach((details, at) => {
    if (opened[at] && opened[at].open) details.open = true;
  });
  old.querySelectorAll("input[type=checkbox]").forEach((box) => {
    const same = [...fresh.querySelectorAll("input[type=checkbox]")].find(
      (other) => other.name === box.name && other.value === box.value,
    );
    if (same) same.checked = box.checked;
  });
  const focused = [...old.querySelectorAll(SELECTABLE)].indexOf(document.activeElement);
  return () => {
    if (focused >= 0) fresh.querySelectorAll(SELECTABLE)[focused]?.focus({ preventScroll: true });
  };
}

const leaving = new AbortController();

async function refresh() {
  const answer = await fetch(location.href, { credentials: "same-origin", signal: leaving.signal });
  if (!answer.ok) return;
  const next = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const old of document.querySelectorAll("[data-live]")) {
    const fresh = next.getElementById(old.id);
    if (!fresh || fresh.innerHTML === old.dataset.shown || inUse(old)) continue;
    const shown = fresh.innerHTML;
    const focus = keepState(old, fresh);
    if (old.getAttribute("role") === "status") old.replaceChildren(...fresh.childNodes); // so that it is spoken
    else old.replaceWith(fresh);
    (document.getElementById(old.id) ?? old).dataset.shown = shown;
    focus();
  }
}

let busy = false;
let again = false;

async function changed() {
  again = true;
  if (busy) return;
  busy = true;
  while (again) {
    again = false;
    try {
      await refresh();
    } catch {
      break; // the page is being left, or the connection's own handler says what is wrong
    }
  }
  busy = false;
}

if (document.querySelector("[data-live]")) {
  const page = location.pathname + location.search;
  const source = new EventSource(`/changes?page=${encodeURIComponent(page)}`);
  source.onmessage = changed;
  source.onopen = () => { connection.textContent = ""; };
  source.onerror = () => { connection.textContent = "The dashboard does not answer. This page may be old."; };
  // A form is answered by another page. What this one shows may be gone by then, such as a job that is deleted.
  document.addEventListener("submit", () => {
    source.close();
    leaving.abort();
  });
}
