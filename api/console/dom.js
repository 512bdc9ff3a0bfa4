// Elements. Data only ever becomes text nodes and attributes, never markup: there is no other way in this console.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `on` holds listeners, `style` goes through the CSSOM (a policy forbids style attributes). */
export function h(tag, given = {}, ...children) {
  return fill(document.createElement(tag), given, children);
}

/** The same for SVG. */
export function s(tag, given = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), given, children);
}

function fill(element, { on = {}, style = {}, data = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
  Object.assign(element.dataset, data);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...shown(children));
  return element;
}

const shown = (children) =>
  children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/** Put children in the place of whatever is there. */
export function put(place, ...children) {
  place.replaceChildren(...shown(children));
  return place;
}

/** Say something to those who do not see it. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

let count = 0;
/** An id that nothing else on the page has. */
export const unique = (name) => `${name}-${++count}`;
