/** The components that the views import from JupyterLab, for a page without JupyterLab. */

import * as React from 'react';

type ButtonProps = React.ButtonHTMLAttributes<HTMLButtonElement> & {
  minimal?: boolean;
  small?: boolean;
};

export function Button({ minimal, small, className, ...others }: ButtonProps): JSX.Element {
  const mods = `${minimal ? 'jp-mod-minimal ' : ''}${small ? 'jp-mod-small ' : ''}`;
  return <button className={`${className ?? ''} ${mods}jp-Button`} {...others} />;
}

export function HTMLSelect(props: React.SelectHTMLAttributes<HTMLSelectElement>): JSX.Element {
  return <select {...props} className={`jp-mod-styled ${props.className ?? ''}`} />;
}
