// The page /docs: Swagger UI on the OpenAPI document of this service. It asks no validator on another host.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger",
  deepLinking: true,
  layout: "BaseLayout",
  validatorUrl: null,
});
