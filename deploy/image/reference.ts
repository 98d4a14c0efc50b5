// SPDX-License-Identifier: Apache-2.0
// What the image is called: by who builds it, by the chart's values, and by whoever imports it into a node. The version
// is that of package.json, which is its one source.

import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

export const ROOT = dirname(dirname(import.meta.dirname));

/** As package.json has it, without a "v". */
export const VERSION = (JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string }).version;

/**
 * Of an image that no registry has: a runtime that does not have it fails to pull it from port 443 of the node, where
 * `docker.io/library`, the default of a name without a registry, would be asked for somebody else's.
 */
export const HUB = 'localhost';
export const IMAGE = 'ambient-redirect';

/** As Go and OCI call them. */
export type Architecture = 'amd64' | 'arm64';

/** Under which `ctr images import` and the kubelet know the image: hub, name and tag. */
export function imageReference(version: string = VERSION): string {
  return `${HUB}/${IMAGE}:${version}`;
}

/** The OCI archive that `npm run image` makes. */
export function imageArchive(architecture: Architecture, directory = join(ROOT, 'dist')): string {
  return join(directory, `${IMAGE}-image-${architecture}.tar`);
}

/** Its ingredients, as CycloneDX. */
export function imageSbom(architecture: Architecture, directory = join(ROOT, 'dist')): string {
  return join(directory, `${IMAGE}-image-${architecture}.cdx.json`);
}
