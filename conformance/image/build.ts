// SPDX-License-Identifier: Apache-2.0

import { ROOT } from '../../deploy/image/reference.ts';
import { exec } from '../netns.ts';

/** `npm run image`, which makes nothing that is there already. `before`: a shell's, for what it must not depend on. */
export async function buildImage(options = '', before = ''): Promise<void> {
  const command = `${before} exec '${process.execPath}' '${ROOT}/.ci/build.mjs' image ${options}`;
  const { status, stderr } = await exec(['sh', '-c', command], { timeout: 280_000 });
  if (status !== 0) throw new Error(`${command}: exit ${status}: ${stderr}`);
}
