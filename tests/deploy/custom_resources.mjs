// node custom_resources.mjs FOLDER: reads a JSON list of Kubernetes objects from standard input and prints, for each
// custom resource, the verdict of its operator's schema. FOLDER holds the @kubernetes-models packages.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const packages = {
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};
const verdicts = [];
for (const document of JSON.parse(readFileSync(0, "utf8"))) {
  const [group, version] = document.apiVersion.split("/");
  const name = packages[group];
  if (!name) continue;
  const file = join(process.argv[2], "@kubernetes-models", name, group, version, document.kind + ".js");
  const module = await import(pathToFileURL(file));
  const Model = module[document.kind] ?? module.default[document.kind];
  let error = null;
  try {
    new Model(document).validate();
  } catch (problem) {
    error = String(problem.message);
  }
  verdicts.push({ kind: document.kind, name: document.metadata.name, error });
}
console.log(JSON.stringify(verdicts));
