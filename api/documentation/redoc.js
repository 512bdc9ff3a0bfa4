// The page /redoc: ReDoc on the OpenAPI document of this service.

// ReDoc shows the logo of its maker, which is on another host. It hides the image if that fails, as it does here.
// React sets the attribute, and then the property.
const attribute = HTMLImageElement.prototype.setAttribute;
const property = Object.getOwnPropertyDescriptor(HTMLImageElement.prototype, "src");

function setSource(image, value) {
  const address = new URL(value, document.baseURI);
  if (address.protocol === "data:" || address.origin === location.origin) property.set.call(image, value);
  else queueMicrotask(() => image.dispatchEvent(new Event("error")));
}

HTMLImageElement.prototype.setAttribute = function (name, value) {
  if (name === "src") setSource(this, value);
  else attribute.call(this, name, value);
};
Object.defineProperty(HTMLImageElement.prototype, "src", {
  ...property,
  set(value) {
    setSource(this, value);
  },
});

Redoc.init("openapi.json", { nativeScrollbars: true }, document.getElementById("redoc"));
