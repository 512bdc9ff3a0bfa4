// The page /redoc: ReDoc on the OpenAPI document of this service.

// ReDoc shows the logo of its maker, which is on another host. It hides the image if that fails, as it does here.
const setAttribute = HTMLImageElement.prototype.setAttribute;
HTMLImageElement.prototype.setAttribute = function (name, value) {
  const address = new URL(value, document.baseURI);
  if (name !== "src" || address.protocol === "data:" || address.origin === location.origin)
    setAttribute.call(this, name, value);
  else queueMicrotask(() => this.dispatchEvent(new Event("error")));
};

Redoc.init("openapi.json", { disableSearch: false, nativeScrollbars: true }, document.getElementById("redoc"));
