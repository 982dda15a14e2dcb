// What the inspector's and the playground's pages share.

export const $ = id => document.getElementById(id);

export function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

// An element. Text becomes text nodes only, so nothing that a model wrote can become markup.
export const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);

// The JSON at an address, with its ETag; null if it has not changed. Errors have the server's sentence.
export async function get(path, options) {
  const response = await fetch(path, options);
  if (response.status === 304) return null;
  const body = await response.json();
  if (!response.ok)
    throw new Error(typeof body.detail === "string" ? body.detail : "the server did not understand the request");
  return Object.assign(body, {etag: response.headers.get("etag")});
}
