// Keeps a page up to date: each server-sent event is an element that the server has rendered. The element with its id is
// changed where it differs, and only there, so that focus, scroll positions and opened details stay.
"use strict";

function change(old, next) {
  if (old.nodeName !== next.nodeName || old.id !== next.id) {
    old.replaceWith(next);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  for (const {name, value} of next.attributes) {
    if (old.getAttribute(name) !== value && !chosen(old, name)) old.setAttribute(name, value);
  }
  for (const {name} of [...old.attributes]) {
    if (!next.hasAttribute(name) && !chosen(old, name)) old.removeAttribute(name);
  }
  const olds = [...old.childNodes], nexts = [...next.childNodes];
  nexts.forEach((child, place) => (place < olds.length ? change(olds[place], child) : old.append(child)));
  olds.slice(nexts.length).forEach((child) => child.remove());
}

// What the user has opened or closed is the user's.
function chosen(element, name) {
  return element.nodeName === "DETAILS" && name === "open";
}

function watch(place) {
  const source = new EventSource(place);
  const offline = document.getElementById("offline");
  source.onmessage = (event) => {
    const next = new DOMParser().parseFromString(JSON.parse(event.data), "text/html").body.firstElementChild;
    const old = document.getElementById(next.id);
    if (old) change(old, next);
  };
  source.onopen = () => offline && (offline.hidden = true);
  source.onerror = () => offline && (offline.hidden = false);
}

// A button that takes something away asks first.
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.ask;
  if (question && !confirm(question)) event.preventDefault();
});

const live = document.querySelector("[data-live]");
if (live) watch(live.dataset.live);
