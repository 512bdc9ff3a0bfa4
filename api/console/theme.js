// The theme is set before anything is painted, so that a page in the dark never flashes. A classic script for that reason.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("palimpsest.theme");
  } catch {} // a browser may forbid the storage
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
